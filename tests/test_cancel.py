"""A cancelled job ends once, whatever it was doing, and its call is still on the bill."""

import asyncio
from datetime import timedelta

import pytest

from headrace_shared.dispatch.dispatch import Dispatch
from headrace_shared.ids import JobId, WorkerId
from headrace_shared.job import JobState
from headrace_shared.outcome import ErrorClass, Failure, Retry, Snoozed, WaitReason
from headrace_shared.store import claims, lost, runs
from headrace_shared.store.jobs import cancel_job
from headrace_shared.store.pool import Pool
from headrace_shared.store.runs import RunEnd
from headrace_shared.testing.clock import Clock
from headrace_shared.testing.jobs import Jobs, eventually
from headrace_shared.testing.scripted_provider import ScriptedProvider, refusal
from headrace_workers.testing import running_worker

pytestmark = [pytest.mark.conformance, pytest.mark.usefixtures("environment")]

HOOK = "https://example.com/hook"
WORKER = WorkerId("w")
LEASE = timedelta(seconds=30)


@pytest.fixture
def jobs(pool: Pool, dispatch: Dispatch) -> Jobs:
    return Jobs(pool, dispatch)


async def cancelled_once(jobs: Jobs, job_id: JobId) -> None:
    ending = await jobs.ending(job_id)
    assert (ending.job.state, ending.answer) == (JobState.CANCELLED, None)
    assert [row["event_type"] for row in await jobs.deliveries(job_id)] == ["job.cancelled"]
    assert await jobs.spend() == await jobs.ledger()


async def test_a_queued_job_ends_at_once_and_is_never_called(jobs: Jobs, scripted: ScriptedProvider) -> None:
    (job_id,) = await jobs.add(webhook=HOOK)
    cancellation = await cancel_job(jobs.pool, job_id)
    assert cancellation is not None
    assert (cancellation.state, cancellation.changed) == (JobState.CANCELLED, True)
    await cancelled_once(jobs, job_id)
    async with running_worker():
        (other,) = await jobs.add()
        await jobs.ended([other])
    assert len(scripted.requests) == 1
    await cancelled_once(jobs, job_id)


async def test_a_job_that_waits_for_its_retry_ends_at_once(jobs: Jobs, scripted: ScriptedProvider) -> None:
    scripted.script(refusal(429, "Later.", headers={"retry-after": "60"}))
    (job_id,) = await jobs.add(webhook=HOOK)
    async with running_worker():
        await jobs.until(job_id, lambda row: row["waiting_for"] == WaitReason.RETRY)
        await cancel_job(jobs.pool, job_id)
        await cancelled_once(jobs, job_id)
    assert len(scripted.requests) == 1


async def test_a_running_job_is_cut_off_and_its_call_stands_in_suspense(
    jobs: Jobs, scripted: ScriptedProvider
) -> None:
    scripted.open.clear()
    (job_id,) = await jobs.add(webhook=HOOK)
    async with running_worker():
        await scripted.arrived(1)
        cancellation = await cancel_job(jobs.pool, job_id)
        assert cancellation is not None
        assert (cancellation.state, cancellation.changed) == (JobState.RUNNING, True)
        await jobs.ended([job_id])
    await cancelled_once(jobs, job_id)
    (call,) = await jobs.calls(job_id)
    assert (call["state"], call["suspense_nano"]) == ("suspense", call["held_nano"])
    assert call["held_nano"] > 0


@pytest.mark.parametrize(
    "outcome",
    [
        Snoozed(timedelta(0), WaitReason.SHUTDOWN),
        Retry(timedelta(0), Failure(ErrorClass.TRANSIENT, "Once.")),
    ],
    ids=["snoozed", "retried"],
)
async def test_a_run_that_would_be_put_back_is_cancelled_instead(
    jobs: Jobs, outcome: Snoozed | Retry
) -> None:
    (job_id,) = await jobs.add(webhook=HOOK)
    (job,) = (await claims.claim_jobs(jobs.pool, [job_id], WORKER, LEASE)).jobs
    await cancel_job(jobs.pool, job_id)
    end = RunEnd(job_id, job.run, outcome, 0)
    ended = await runs.finish(jobs.pool, WORKER, 1, conclusions=[], attempts=[], ends=[end])
    assert ended.states == {(job_id, job.run): JobState.CANCELLED}
    await cancelled_once(jobs, job_id)


async def test_a_cancelled_job_whose_worker_died_is_not_run_again(jobs: Jobs, clock: Clock) -> None:
    (job_id,) = await jobs.add(webhook=HOOK)
    await claims.claim_jobs(jobs.pool, [job_id], WORKER, LEASE)
    await cancel_job(jobs.pool, job_id)
    await clock.advance(LEASE + timedelta(seconds=1))
    reaped = await lost.reap(jobs.pool)
    assert [(one.id, one.state) for one in reaped] == [(job_id, JobState.CANCELLED)]
    await cancelled_once(jobs, job_id)


async def test_cancelling_what_has_ended_changes_nothing(jobs: Jobs, scripted: ScriptedProvider) -> None:
    (job_id,) = await jobs.add(webhook=HOOK)
    async with running_worker():
        await jobs.ended([job_id])
    before = await jobs.row(job_id)
    cancellation = await cancel_job(jobs.pool, job_id)
    assert cancellation is not None
    assert (cancellation.state, cancellation.changed) == (JobState.SUCCEEDED, False)
    assert await jobs.row(job_id) == before


async def test_a_race_with_the_answer_has_one_ending(jobs: Jobs, scripted: ScriptedProvider) -> None:
    """Cancels and answers meet at every point of a run; whoever is first has the job."""
    ids = await jobs.add(40, webhook=HOOK)
    async with running_worker(concurrency=40):
        await scripted.arrived(1)
        for job_id in ids:
            await cancel_job(jobs.pool, job_id)
            await asyncio.sleep(0)
        endings = await jobs.ended(ids)
        await eventually(lambda: deliveries(jobs), lambda found: found == len(ids))
    for ending in endings:
        assert ending.job.state in (JobState.SUCCEEDED, JobState.CANCELLED)
        assert (ending.answer is not None) == (ending.job.state is JobState.SUCCEEDED)
        assert [row["event_type"] for row in await jobs.deliveries(ending.job.id)] == [
            f"job.{ending.job.state}"
        ]
    assert await jobs.spend() == await jobs.ledger()


async def deliveries(jobs: Jobs) -> int:
    return int(await jobs.pool.fetchval("SELECT count(*) FROM headrace.deliveries"))
