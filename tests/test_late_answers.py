"""An answer that comes after its run was lost: booked once, counted right, never paid for again."""

from datetime import timedelta

import pytest

from headrace_shared.budgets import Budgets, Held, HoldRequest
from headrace_shared.dispatch.dispatch import Dispatch
from headrace_shared.ids import CallNumber, JobId, WorkerId, hold_id
from headrace_shared.job import ClaimedJob
from headrace_shared.money import NanoUSD
from headrace_shared.outcome import ErrorClass
from headrace_shared.scopes import scopes_of
from headrace_shared.store import claims, lost, runs
from headrace_shared.store.pool import Pool
from headrace_shared.store.runs import Conclusion, Intent
from headrace_shared.testing.clock import Clock
from headrace_shared.testing.jobs import MODEL, Jobs
from headrace_shared.testing.scripted_provider import Scripted, ScriptedProvider, completion
from headrace_shared.usage import Usage
from headrace_workers.testing import running_worker

pytestmark = [pytest.mark.conformance, pytest.mark.usefixtures("environment")]

LEASE = timedelta(seconds=10)
WORKER = WorkerId("frozen")
AMOUNT = NanoUSD(5_000)
SECOND = timedelta(seconds=1)


@pytest.fixture
def jobs(pool: Pool, dispatch: Dispatch) -> Jobs:
    return Jobs(pool, dispatch)


async def claim(pool: Pool, job_id: JobId) -> ClaimedJob:
    [job] = (await claims.claim_jobs(pool, [job_id], WORKER, LEASE)).jobs
    return job


async def open_call(pool: Pool, budgets: Budgets, job: ClaimedJob, number: int = 1) -> bool:
    call, scopes = CallNumber(number), scopes_of(job, job.queue.route)
    [held] = await budgets.hold([HoldRequest(hold_id(job.id, job.run, call), AMOUNT, scopes)])
    assert isinstance(held, Held)
    intent = Intent(job.id, job.run, call, "openai", MODEL, held.id, AMOUNT, held.at, scopes, "test")
    return (job.id, call) in await runs.open_calls(pool, held.epoch, [intent])


async def conclude(pool: Pool, job: ClaimedJob, state: str) -> runs.Finished:
    call = CallNumber(1)
    if state == "answered":
        known = Conclusion(
            job.id, job.run, call, state, SECOND, status=200, usage=Usage(9, 0, 3, 0), answer=b"{}"
        )
    else:
        known = Conclusion(job.id, job.run, call, state, SECOND, 500, ErrorClass.TRANSIENT)
    return await runs.finish(pool, WORKER, 1, conclusions=[known], attempts=[], ends=[])


async def lose(pool: Pool, clock: Clock) -> None:
    await clock.advance(2 * LEASE)
    assert await lost.reap(pool)


@pytest.mark.parametrize("state", ["answered", "failed"])
async def test_a_corrected_suspense_is_told(
    pool: Pool, jobs: Jobs, budgets: Budgets, clock: Clock, state: str
) -> None:
    [job_id] = await jobs.add()
    lost = await claim(pool, job_id)
    assert await open_call(pool, budgets, lost)
    await lose(pool, clock)
    finished = await conclude(pool, lost, state)
    assert finished.corrected == {(job_id, lost.run)}
    assert finished.states == {}
    assert (await conclude(pool, lost, state)).corrected == set()


@pytest.mark.parametrize(("state", "allowed"), [("answered", False), ("failed", True)])
async def test_what_an_earlier_run_was_answered_is_not_asked_again(
    pool: Pool, jobs: Jobs, budgets: Budgets, clock: Clock, state: str, *, allowed: bool
) -> None:
    [job_id] = await jobs.add()
    lost = await claim(pool, job_id)
    assert await open_call(pool, budgets, lost)
    await lose(pool, clock)
    present = await claim(pool, job_id)
    assert await open_call(pool, budgets, present)
    await conclude(pool, lost, state)
    assert await open_call(pool, budgets, present, 2) is allowed


async def test_a_redirect_is_not_followed(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    async with ScriptedProvider([completion()]) as elsewhere:
        away = Scripted(307, b"", {"location": f"{elsewhere.url}/chat/completions"})
        async with ScriptedProvider([away]) as provider:
            monkeypatch.setenv("OPENAI_API_KEY", "sk-scripted")
            monkeypatch.setenv("OPENAI_BASE_URL", provider.url)
            [job_id] = await jobs.add()
            async with running_worker():
                [ending] = await jobs.ended([job_id])
        assert elsewhere.requests == []
    assert ending.job.error_class == ErrorClass.BAD_REQUEST
    assert (ending.job.error or "").startswith("307")
