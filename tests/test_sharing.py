"""Identical requests in flight become one provider call, whose answer is everybody's."""

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta

import pytest
from worker_processes import worker

from headrace_producer import Headrace, JobRequest
from headrace_producer.client import JobHandle
from headrace_shared.budgets import Budgets
from headrace_shared.dispatch.dispatch import Dispatch, Entry
from headrace_shared.errors import InvalidRequest, JobFailed
from headrace_shared.ids import JobId, Lane, Run, Tenant, WorkerId
from headrace_shared.job import JobState
from headrace_shared.outcome import Snoozed, WaitReason
from headrace_shared.store import claims, flights, runs
from headrace_shared.store.flights import Passenger
from headrace_shared.store.pool import Pool
from headrace_shared.testing.clock import Clock
from headrace_shared.testing.jobs import eventually
from headrace_shared.testing.scripted_provider import ScriptedProvider, completion, refusal
from headrace_workers.finisher import Finish, Finisher
from headrace_workers.landing import Landing
from headrace_workers.reaper import Reaper
from headrace_workers.testing import running_worker

pytestmark = pytest.mark.usefixtures("environment")

CHAT = "/v1/chat/completions"
WORKER = WorkerId("w")
LEASE = timedelta(minutes=1)


def question(text: str = "What is a headrace?", **more: float) -> Mapping[str, object]:
    message = {"role": "user", "content": text}
    return {"model": "gpt-4o-mini", "messages": [message], "temperature": 0, **more}


async def ask(headrace: Headrace, count: int) -> list[JobHandle]:
    return list(await headrace.enqueue_many([JobRequest(CHAT, question())] * count))


async def followers(pool: Pool, count: int) -> None:
    """Wait until so many jobs wait for another's answer."""

    async def waiting() -> int:
        row = await pool.fetchrow(
            "SELECT count(*) FROM headrace.jobs WHERE state = 'queued' AND waiting_for = $1",
            WaitReason.FLIGHT,
        )
        return row[0] if row else 0

    await eventually(waiting, lambda found: found == count)


async def leader_of(pool: Pool) -> object:
    row = await pool.fetchrow("SELECT leader FROM headrace.flights")
    return row["leader"] if row else None


def passenger(job: JobHandle) -> Passenger:
    return Passenger(JobId(job.id), Run(0), Tenant("default"), b"the same")


async def test_identical_jobs_are_one_call_and_one_bill(
    headrace: Headrace, pool: Pool, silent: ScriptedProvider
) -> None:
    jobs = await ask(headrace, 20)
    async with running_worker():
        await followers(pool, 19)
        silent.open.set()
        results = await asyncio.gather(*(job.result() for job in jobs))
    assert len(silent.requests) == 1
    assert len({result.raw for result in results}) == 1
    own = [result for result in results if result.answered_by is None]
    assert len(own) == 1
    assert {result.answered_by for result in results if result is not own[0]} == {own[0].job_id}
    assert [result.usage.cost_nano_usd > 0 for result in results].count(True) == 1
    assert await leader_of(pool) is None


async def test_followers_hold_neither_slot_nor_money(
    headrace: Headrace, pool: Pool, silent: ScriptedProvider
) -> None:
    jobs = await ask(headrace, 12)
    async with running_worker(concurrency=2):
        await followers(pool, 11)
        other = await headrace.enqueue(CHAT, question("Something else"))
        await silent.arrived(2)
        open_calls = await pool.fetch("SELECT job_id FROM headrace.calls WHERE state = 'open'")
        assert len(open_calls) == 2
        silent.open.set()
        await asyncio.gather(other.result(), *(job.result() for job in jobs))
    assert len(silent.requests) == 2


CASES: Mapping[str, tuple[Callable[[int], JobRequest], int]] = {
    "temperature 0": (lambda _: JobRequest(CHAT, question()), 1),
    "temperature 1": (lambda _: JobRequest(CHAT, question(temperature=1)), 3),
    "asked for": (lambda _: JobRequest(CHAT, question(temperature=1), share=True), 1),
    "not wanted": (lambda _: JobRequest(CHAT, question(), share=False), 3),
    "other tenants": (lambda number: JobRequest(CHAT, question(), tenant=f"tenant-{number}"), 3),
    "other requests": (lambda number: JobRequest(CHAT, question(seed=number)), 3),
}


@pytest.mark.parametrize(("request_of", "calls"), CASES.values(), ids=CASES.keys())
async def test_what_is_shared(
    headrace: Headrace,
    pool: Pool,
    silent: ScriptedProvider,
    request_of: Callable[[int], JobRequest],
    calls: int,
) -> None:
    jobs = await headrace.enqueue_many([request_of(number) for number in range(3)])
    async with running_worker():
        await silent.arrived(calls)
        await followers(pool, 3 - calls)
        silent.open.set()
        await asyncio.gather(*(job.result() for job in jobs))
    assert len(silent.requests) == calls


async def test_cancelling_the_leader_promotes_one_of_the_others(
    headrace: Headrace, pool: Pool, silent: ScriptedProvider
) -> None:
    jobs = await ask(headrace, 5)
    async with running_worker():
        await followers(pool, 4)
        await silent.arrived(1)
        first = await leader_of(pool)
        await headrace.cancel(str(first))
        await silent.arrived(2)
        assert await leader_of(pool) not in (first, None)
        silent.open.set()
        results = await asyncio.gather(*(job.result() for job in jobs if job.id != first))
    assert len(silent.requests) == 2
    assert len(results) == 4


async def test_a_permanent_error_ends_all(headrace: Headrace, pool: Pool, silent: ScriptedProvider) -> None:
    silent.script(refusal(400, "no such parameter"))
    jobs = await ask(headrace, 4)
    async with running_worker():
        await followers(pool, 3)
        silent.open.set()
        errors = await asyncio.gather(*(job.result() for job in jobs), return_exceptions=True)
    assert len(silent.requests) == 1
    assert [error.error_class for error in errors if isinstance(error, JobFailed)] == ["bad_request"] * 4


async def test_a_transient_error_that_ends_the_leader_promotes_another(
    headrace: Headrace, pool: Pool, silent: ScriptedProvider
) -> None:
    silent.script(refusal(500, "try again"), completion())
    requests = [JobRequest(CHAT, question(), max_attempts=1) for _ in range(4)]
    jobs = await headrace.enqueue_many(requests)
    async with running_worker():
        await followers(pool, 3)
        silent.open.set()
        found = await asyncio.gather(*(job.result() for job in jobs), return_exceptions=True)
    assert len(silent.requests) == 2
    assert [isinstance(one, JobFailed) for one in found].count(True) == 1


@pytest.mark.parametrize(
    "change",
    [
        "run_at = run_at - interval '2 minutes'",
        "run_at = run_at + interval '2 minutes'",
    ],
    ids=["for nobody who takes it up", "for long"],
)
async def test_a_leader_that_waits_gives_its_place_away(headrace: Headrace, pool: Pool, change: str) -> None:
    first, second = sorted(await ask(headrace, 2), key=lambda job: job.id)
    joined = await flights.join(pool, [passenger(first), passenger(second)])
    assert joined == {second.id}
    assert await flights.land(pool, [first.id]) == []
    await pool.execute(f"UPDATE headrace.jobs SET {change} WHERE id = $1", first.id)  # noqa: S608 - of this test
    (promoted,) = await flights.land(pool, [first.id])
    assert (promoted.id, promoted.state) == (second.id, JobState.QUEUED)
    assert await flights.join(pool, [passenger(first)]) == {first.id}


async def test_a_follower_that_is_promoted_before_it_waits_goes_on_at_once(
    headrace: Headrace, pool: Pool, dispatch: Dispatch, budgets: Budgets
) -> None:
    first, second = sorted(await ask(headrace, 2), key=lambda job: job.id)
    entries = {one.id: one for one in await claim_ids(dispatch)}
    (job,) = (await claims.claim_jobs(pool, [JobId(second.id)], WORKER, LEASE)).jobs
    assert await flights.join(pool, [passenger(first)]) == set()
    here = Passenger(job.id, job.run, job.queue.tenant, passenger(first).digest)
    assert await flights.join(pool, [here]) == {second.id}
    await headrace.cancel(first.id)
    await Landing(pool, dispatch).land([first.id])
    assert await leader_of(pool) == second.id
    finisher = Finisher(pool, dispatch, budgets, WORKER, {})
    end = runs.RunEnd(job.id, job.run, Snoozed(timedelta(minutes=1), WaitReason.FLIGHT), 0)
    assert await finisher.submit(Finish(entries[job.id], None, None, None, end))
    await finisher.drain()
    row = await pool.fetchrow("SELECT waiting_for FROM headrace.jobs WHERE id = $1", job.id)
    assert row is not None
    assert row["waiting_for"] is None
    assert await claim_ids(dispatch) == [entries[job.id]]
    (again,) = (await claims.claim_jobs(pool, [job.id], WORKER, LEASE)).jobs
    assert again.run == 2


async def claim_ids(dispatch: Dispatch) -> Sequence[Entry]:
    return (await dispatch.claim(10, {Lane("default"): 1}, LEASE, LEASE)).entries


async def test_a_leader_that_tries_again_soon_leads_on(headrace: Headrace, pool: Pool) -> None:
    first, second = sorted(await ask(headrace, 2), key=lambda job: job.id)
    await flights.join(pool, [passenger(first), passenger(second)])
    await pool.execute("UPDATE headrace.jobs SET waiting_for = 'budget' WHERE id = $1", first.id)
    assert await flights.land(pool, [first.id]) == []
    assert await leader_of(pool) == first.id


async def test_what_nobody_landed_the_reaper_lands(headrace: Headrace, pool: Pool, reaper: Reaper) -> None:
    first, second = sorted(await ask(headrace, 2), key=lambda job: job.id)
    await flights.join(pool, [passenger(first), passenger(second)])
    await headrace.cancel(first.id)
    await reaper.turn()
    assert await leader_of(pool) == second.id


async def test_many_at_once_over_several_processes_are_one_call_and_two_if_the_leader_is_killed(
    headrace: Headrace, pool: Pool, silent: ScriptedProvider, clock: Clock
) -> None:
    jobs = await ask(headrace, 300)
    async with contextlib.AsyncExitStack() as stack:
        workers = [await stack.enter_async_context(worker(lease_seconds=600)) for _ in range(4)]
        await followers(pool, 299)
        await silent.arrived(1)
        assert len(silent.requests) == 1
        row = await pool.fetchrow("SELECT worker FROM headrace.jobs WHERE id = $1", await leader_of(pool))
        assert row is not None
        (its,) = [process for process in workers if f"-{process.pid}-" in row["worker"]]
        its.kill()
        await its.wait()
        await clock.advance(timedelta(seconds=601))
        await silent.arrived(2)
        silent.open.set()
        results = await asyncio.gather(*(job.result() for job in jobs))
    assert len(silent.requests) == 2
    assert len({result.raw for result in results}) == 1


async def test_nonsense_is_refused(headrace: Headrace) -> None:
    with pytest.raises(InvalidRequest, match="share"):
        await headrace.enqueue("summarise", {"text": "x"}, share=True)
