"""What a newer producer asks for waits for a worker that knows it; nothing fails, nothing spins."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from functools import partial

import asyncpg
import pytest

from headrace_shared.dispatch.dispatch import Dispatch
from headrace_shared.ids import JobId, WorkerId
from headrace_shared.job import JobState
from headrace_shared.store import claims
from headrace_shared.store.claims import PLAIN, Abilities, Standing
from headrace_shared.store.pool import Pool
from headrace_shared.testing.clock import Clock
from headrace_shared.testing.jobs import Jobs
from headrace_shared.testing.simulated_provider import SimulatedProvider
from headrace_workers import claiming
from headrace_workers.testing import running_worker

pytestmark = pytest.mark.usefixtures("environment")

NEWER = WorkerId("newer")
LEASE = timedelta(seconds=30)
PAUSE = timedelta(seconds=5)
ENDPOINT = "UPDATE headrace.jobs SET endpoint = '/v1/rerank' WHERE id = $1"
NEED = "UPDATE headrace.jobs SET needs = '{thinking}' WHERE id = $1"
KNOWING = Abilities(PLAIN.endpoints, (*PLAIN.needs, "thinking"))


@pytest.fixture
def jobs(pool: Pool, dispatch: Dispatch) -> Jobs:
    return Jobs(pool, dispatch)


async def of_a_newer_producer(jobs: Jobs, change: str) -> JobId:
    """A queued job whose row says what this code has never heard of."""
    (job_id,) = await jobs.add(push=False)
    await jobs.pool.execute(change, job_id)
    return job_id


def _is_later(due: datetime, row: asyncpg.Record) -> bool:
    later: bool = row["run_at"] > due
    return later


async def looked_at(jobs: Jobs, ids: Sequence[JobId]) -> None:
    """Wait until a worker has put them all off."""
    for job_id in ids:
        await jobs.until(job_id, lambda row: row["waiting_for"] == "worker")


@pytest.mark.parametrize("change", [ENDPOINT, NEED])
async def test_what_this_worker_does_not_know_is_put_back_and_others_run(
    jobs: Jobs, clock: Clock, provider: SimulatedProvider, change: str
) -> None:
    unknown = [await of_a_newer_producer(jobs, change) for _ in range(3)]
    async with running_worker() as here:
        known = await jobs.add(5)
        endings = await jobs.ended(known)
        await looked_at(jobs, unknown)
        # Time is moved on until each of them has been taken up, and put off, three more times.
        for _ in range(3):
            await clock.advance(PAUSE + timedelta(seconds=1))
            due = await jobs.pool.fetchval("SELECT headrace.now()")
            for job_id in unknown:
                await jobs.until(job_id, partial(_is_later, due))
        assert not here.running
    assert {ending.job.state for ending in endings} == {JobState.SUCCEEDED}
    rows = [await jobs.row(job_id) for job_id in unknown]
    assert {
        (row["state"], row["waiting_for"], row["run"], row["attempts"], row["crashes"]) for row in rows
    } == {("queued", "worker", 0, 0, 0)}
    assert provider.books.total.requests == 5


async def test_a_job_that_nobody_here_knows_is_looked_at_once_in_a_while(
    jobs: Jobs,
    provider: SimulatedProvider,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many claims others cause meanwhile."""
    monkeypatch.setattr(claiming, "_UNKNOWN_PAUSE", timedelta(hours=1))
    unknown = await of_a_newer_producer(jobs, NEED)
    async with running_worker():
        await looked_at(jobs, [unknown])
        first = (await jobs.row(unknown))["run_at"]
        for _ in range(10):
            await jobs.ended(await jobs.add(3))
    assert (await jobs.row(unknown))["run_at"] == first
    said = [record for record in caplog.records if "need a worker that knows more" in record.getMessage()]
    assert len(said) == 1


async def test_a_worker_that_knows_takes_what_others_put_back(
    pool: Pool, jobs: Jobs, clock: Clock, provider: SimulatedProvider
) -> None:
    unknown = await of_a_newer_producer(jobs, NEED)
    async with running_worker():
        await looked_at(jobs, [unknown])
    await clock.advance(PAUSE + timedelta(seconds=1))
    (found,) = await claims.look_up(pool, [unknown])
    assert found.standing is Standing.UNKNOWN
    assert (await claims.claim_jobs(pool, [unknown], NEWER, LEASE)).jobs == []
    (job,) = (await claims.claim_jobs(pool, [unknown], NEWER, LEASE, abilities=KNOWING)).jobs
    assert (job.id, job.run) == (unknown, 1)
    assert (await jobs.row(unknown))["waiting_for"] is None
