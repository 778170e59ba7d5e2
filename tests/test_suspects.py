"""A job that lost two workers runs in a process of its own; only that process's death condemns it."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
from pydantic import BaseModel
from worker_processes import gone, worker

from headrace_producer import Headrace
from headrace_shared.budgets import Budgets
from headrace_shared.dispatch.dispatch import Dispatch
from headrace_shared.ids import JobId, WorkerId
from headrace_shared.settings import load_settings
from headrace_shared.store import claims
from headrace_shared.store.pool import Pool
from headrace_shared.testing.clock import Clock
from headrace_shared.testing.jobs import Jobs, eventually
from headrace_shared.testing.scripted_provider import ScriptedProvider
from headrace_workers import Context, handler
from headrace_workers.suspects import MOST, Suspects

pytestmark = [pytest.mark.conformance, pytest.mark.usefixtures("environment")]

LEASE = timedelta(seconds=600)
PATIENCE = timedelta(seconds=90)
"""Some processes must start before."""
WORKER = WorkerId("parent")
QUARANTINED = "its process died, in which it ran alone: signal 9 (killed)"


class Processes:
    """The processes that run suspects, found by the ids in their command lines."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    async def of(self, job_id: JobId) -> int:
        """Wait for the process of a job and return its pid."""
        found = await eventually(lambda: asyncio.to_thread(self._find, job_id), lambda pids: len(pids) == 1)
        return found[0]

    async def kill(self, job_id: JobId) -> None:
        pid = await self.of(job_id)
        os.kill(pid, signal.SIGKILL)
        await gone(pid)

    def _find(self, job_id: JobId) -> list[int]:
        found: list[int] = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError, ValueError):
                if str(job_id).encode() in (entry / "cmdline").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
        self._seen.update(found)
        return found

    def end(self) -> None:
        for pid in self._seen:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def jobs(pool: Pool, dispatch: Dispatch) -> Jobs:
    return Jobs(pool, dispatch)


@pytest.fixture
async def processes() -> AsyncIterator[Processes]:
    processes = Processes()
    yield processes
    processes.end()


@pytest.fixture
def suspects(pool: Pool, dispatch: Dispatch, budgets: Budgets) -> Suspects:
    return Suspects(pool, dispatch, budgets, load_settings(), WORKER)


async def suspected(jobs: Jobs, count: int = 1) -> list[JobId]:
    """Jobs that lost their workers twice."""
    ids = await jobs.add(count, push=False)
    await jobs.pool.execute("UPDATE headrace.jobs SET crashes = 2")
    return ids


async def standings(jobs: Jobs, ids: Sequence[JobId]) -> list[tuple[object, ...]]:
    rows = [await jobs.row(job_id) for job_id in ids]
    return [(row["state"], row["error_class"], row["crashes"]) for row in rows]


async def until_alone(jobs: Jobs, count: int) -> list[JobId]:
    """Wait until so many jobs run alone, and return them."""
    query = "SELECT id FROM headrace.jobs WHERE state = 'running' AND alone"
    rows = await eventually(lambda: jobs.pool.fetch(query), lambda found: len(found) == count)
    return [JobId(row["id"]) for row in rows]


async def test_only_the_job_whose_own_process_died_is_quarantined(
    jobs: Jobs, silent: ScriptedProvider, processes: Processes, clock: Clock
) -> None:
    ids = await jobs.add(3)
    for crash in range(2):
        async with worker(lease_seconds=600) as process:
            await silent.arrived(3 * (crash + 1))
            process.kill()
            await process.wait()
        await clock.advance(LEASE + timedelta(seconds=1))
    async with worker(lease_seconds=600):
        # One that may use eight slots runs no more of them than this at a time.
        await silent.arrived(6 + MOST)
        alone = await until_alone(jobs, MOST)
        await processes.kill(alone[0])
        row = await jobs.until(alone[0], lambda row: row["ended_at"] is not None)
        assert (row["error_class"], row["error"], row["crashes"]) == ("quarantined", QUARANTINED, 3)
        silent.open.set()
        others = [job_id for job_id in ids if job_id != alone[0]]
        await jobs.ended(others, within=PATIENCE)
    assert await standings(jobs, others) == [("succeeded", None, 2)] * 2
    assert [call["state"] for call in await jobs.calls(alone[0])] == ["suspense"] * 3
    assert await jobs.spend() == await jobs.ledger()


class Question(BaseModel):
    text: str


@handler("poison")
async def poison(ctx: Context, question: Question) -> Question:
    os.kill(os.getpid(), signal.SIGSEGV)
    return question


async def test_a_handler_that_kills_every_process_ends_and_its_neighbours_succeed(
    headrace: Headrace, jobs: Jobs, silent: ScriptedProvider, clock: Clock
) -> None:
    here = {"PYTHONPATH": str(Path(__file__).parent)}
    neighbours = await jobs.add(2)
    async with worker(environment=here, handlers="test_suspects", lease_seconds=600) as process:
        await silent.arrived(2)
        job = await headrace.enqueue("poison", Question(text="Hello"))
        assert await process.wait() == -signal.SIGSEGV
    await clock.advance(LEASE + timedelta(seconds=1))
    async with worker(environment=here, handlers="test_suspects", lease_seconds=600) as process:
        assert await process.wait() == -signal.SIGSEGV
    await clock.advance(LEASE + timedelta(seconds=1))
    silent.open.set()
    async with worker(environment=here, handlers="test_suspects", lease_seconds=600) as process:
        endings = await jobs.ended([job.id, *neighbours], within=PATIENCE)
        assert process.returncode is None
    states = [(ending.job.state, ending.job.error_class, ending.job.attempts) for ending in endings]
    assert states == [("failed", "quarantined", 0), *[("succeeded", None, 0)] * 2]
    row = await jobs.row(job.id)
    assert (row["crashes"], row["error"]) == (3, QUARANTINED.replace("9 (killed)", "11 (segmentation fault)"))


async def test_a_worker_that_stops_has_the_suspect_given_back(
    jobs: Jobs, silent: ScriptedProvider, processes: Processes
) -> None:
    (job_id,) = await suspected(jobs)
    async with worker(lease_seconds=600, drain_seconds=0) as process:
        await silent.arrived(1)
        pid = await processes.of(job_id)
        process.terminate()
        assert await asyncio.wait_for(process.wait(), PATIENCE.total_seconds()) == 0
        await gone(pid)
    row = await jobs.row(job_id)
    assert (row["state"], row["waiting_for"], row["crashes"]) == ("queued", "shutdown", 2)


async def test_a_suspect_outlives_its_worker(
    jobs: Jobs, silent: ScriptedProvider, processes: Processes
) -> None:
    (job_id,) = await suspected(jobs)
    async with worker(lease_seconds=600) as process:
        await silent.arrived(1)
        pid = await processes.of(job_id)
        process.kill()
        await process.wait()
    silent.open.set()
    (ending,) = await jobs.ended([job_id], within=PATIENCE)
    assert (ending.job.state, ending.job.crashes) == ("succeeded", 2)
    await gone(pid)
    assert len(silent.requests) == 1


async def test_a_process_that_died_before_it_had_the_job_condemns_nothing(
    pool: Pool, jobs: Jobs, processes: Processes, suspects: Suspects, silent: ScriptedProvider
) -> None:
    """Another one has it meanwhile, and lives."""
    (job_id,) = await suspected(jobs)
    taken = await claims.claim_jobs(pool, [job_id], WorkerId("another"), LEASE, alone=True)
    assert [job.id for job in taken.jobs] == [job_id]
    freed = asyncio.Event()
    assert suspects.take(job_id, freed.set)
    await processes.kill(job_id)
    await freed.wait()
    assert len(suspects) == 0
    assert await standings(jobs, [job_id]) == [("running", None, 2)]
    assert silent.requests == []


async def test_a_worker_that_is_being_stopped_holds_a_killed_process_against_nobody(
    jobs: Jobs, processes: Processes, suspects: Suspects, silent: ScriptedProvider
) -> None:
    (job_id,) = await suspected(jobs)
    freed = asyncio.Event()
    assert suspects.take(job_id, freed.set)
    assert not suspects.take(job_id, freed.set)
    await silent.arrived(1)
    suspects.stop()
    await processes.kill(job_id)
    await freed.wait()
    assert await standings(jobs, [job_id]) == [("running", None, 2)]


async def test_a_process_that_hangs_without_its_job_is_ended(
    pool: Pool, dispatch: Dispatch, budgets: Budgets, jobs: Jobs, processes: Processes
) -> None:
    (job_id,) = await suspected(jobs)
    freed = asyncio.Event()
    look = timedelta(milliseconds=500)
    suspects = Suspects(pool, dispatch, budgets, load_settings(), WORKER, look=look)
    assert suspects.take(job_id, freed.set)
    os.kill(await processes.of(job_id), signal.SIGSTOP)
    await asyncio.wait_for(freed.wait(), PATIENCE.total_seconds())
    assert await standings(jobs, [job_id]) == [("queued", None, 2)]
