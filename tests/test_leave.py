"""Leave for a call that is not made after all keeps nobody else waiting."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta

import pytest

from headrace_shared.dispatch import breakers, keys, limits
from headrace_shared.dispatch.dispatch import Dispatch
from headrace_shared.ids import HoldId, WorkerId
from headrace_shared.job import ClaimedJob
from headrace_shared.money import NanoUSD
from headrace_shared.outcome import Cancelled, ErrorClass, Failed, Outcome, Snoozed, Succeeded, WaitReason
from headrace_shared.routes import Target
from headrace_shared.settings import load_settings
from headrace_shared.store import claims
from headrace_shared.store.money import BudgetPolicy, WindowKind
from headrace_shared.store.pool import Pool
from headrace_shared.testing.clock import script
from headrace_shared.testing.jobs import LANE, MODEL, Jobs, eventually
from headrace_shared.testing.scripted_provider import ScriptedProvider
from headrace_workers.breaker import NotNow, Permit
from headrace_workers.execution import Execution, Road, Run, Step
from headrace_workers.parts import Parts, execution_of, open_parts, steps_of
from headrace_workers.steps.journal import Journal

pytestmark = pytest.mark.usefixtures("environment", "silent")

LEASE = timedelta(minutes=1)
TARGET = Target("openai", MODEL)
_IS_DUE = script("""
local time, looks_again = redis.call('TIME'), redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')[2]
return tonumber(looks_again) <= time[1] * 1000 + time[2] / 1000 and 1 or 0
""")
ONE_AT_A_TIME = {"limits": {f"openai/{MODEL}": {"concurrent": 1}}}


@pytest.fixture
async def jobs(pool: Pool, dispatch: Dispatch) -> Jobs:
    jobs = Jobs(pool, dispatch)
    await jobs.configure(ONE_AT_A_TIME)
    return jobs


@pytest.fixture
async def parts(jobs: Jobs) -> AsyncIterator[Parts]:
    del jobs
    async with open_parts(load_settings(), WorkerId("w")) as parts:
        yield parts


async def claim(parts: Parts) -> Sequence[ClaimedJob]:
    found = await parts.dispatch.claim(10, {LANE: 1}, LEASE, LEASE)
    ids = [entry.id for entry in found.entries]
    return (await claims.claim_jobs(parts.pool, ids, WorkerId("w"), LEASE)).jobs


def until_the_journal(parts: Parts) -> Sequence[Step]:
    steps = steps_of(parts)
    return steps[: next(place for place, step in enumerate(steps) if isinstance(step, Journal))]


async def test_a_retry_that_has_to_wait_takes_no_room_under_the_limits(jobs: Jobs, parts: Parts) -> None:
    await jobs.add(1)
    while await parts.retry_budget.wait_of("openai") is None:
        pass
    [job] = await claim(parts)

    async def settle(run: Run) -> Outcome:
        return run.outcome or Succeeded()

    retry = Run.of(job)._replace(is_retry=True)
    run, outcome = await Road(until_the_journal(parts), settle).go(retry, Cancelled)
    assert isinstance(outcome, Snoozed)
    assert outcome.reason is WaitReason.RETRY
    assert run.admission is None


async def test_a_job_that_comes_to_no_call_leaves_its_place_to_another(jobs: Jobs, parts: Parts) -> None:
    await limits.publish(parts.redis, parts.configured.now.version, parts.configured.now.configuration)
    await parts.budgets.set("global", WindowKind.TOTAL, NanoUSD(1), BudgetPolicy.WAIT)
    await jobs.add(2)
    [job] = await claim(parts)
    assert await claim(parts) == []
    limiter = keys.LIMITER + f"openai/{MODEL}"
    assert float((await parts.redis.hash(limiter))["claimed"]) == 1
    assert isinstance(await execution_of(parts).run(job), Failed)
    await parts.limiter.report()
    assert float((await parts.redis.hash(limiter))["claimed"]) == 0
    assert await parts.redis.evaluate(_IS_DUE, [keys.WAITING]) == 1
    assert len(await claim(parts)) == 1


async def probing(parts: Parts, jobs: Jobs) -> tuple[Execution, ClaimedJob]:
    """Open the breaker, and claim a job that may probe at once."""
    await breakers.open_(parts.redis, TARGET, timedelta(0), None)
    await parts.breakers.of(TARGET).share()
    await jobs.add(1)
    [job] = await claim(parts)
    return execution_of(parts), job


async def test_a_probe_that_is_not_sent_is_somebody_elses(jobs: Jobs, parts: Parts) -> None:
    execution, job = await probing(parts, jobs)
    await parts.budgets.rebuild()
    async with parts.pool.acquire() as connection, connection.transaction():
        # Its intent waits here, and comes to nothing under another epoch.
        await connection.execute("SELECT pg_advisory_xact_lock(4850, 1)")
        running = asyncio.ensure_future(execution.run(job))
        await eventually(lambda: breakers.view(parts.redis, TARGET), lambda standing: standing.probing)
        await connection.execute("UPDATE headrace.money SET epoch = epoch + 1")
    assert isinstance(await running, Snoozed)
    standing = await breakers.view(parts.redis, TARGET)
    assert standing.is_open
    assert not standing.probing
    assert await parts.breakers.of(TARGET).admit(HoldId("next")) == Permit("next")


async def test_a_probe_that_was_sent_is_nobody_elses_before_its_lease_is_over(
    jobs: Jobs, parts: Parts, silent: ScriptedProvider
) -> None:
    """A target that hangs would get one after the other, and each may have to be paid for."""
    execution, job = await probing(parts, jobs)
    running = asyncio.ensure_future(execution.run(job))
    await silent.arrived(1)
    execution.interrupt(job, ErrorClass.CANCELLED, running)
    assert isinstance(await running, Cancelled)
    assert (await breakers.view(parts.redis, TARGET)).probing
    assert isinstance(await parts.breakers.of(TARGET).admit(HoldId("next")), NotNow)
