"""Code that does not give the event loop back is noticed and named; its jobs end elsewhere, once."""

import asyncio
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
from worker_processes import worker

from headrace_shared.dispatch.dispatch import Dispatch
from headrace_shared.ids import WorkerId
from headrace_shared.job import ClaimedJob
from headrace_shared.outcome import Outcome, Snoozed, Succeeded, WaitReason
from headrace_shared.store import claims
from headrace_shared.store.pool import Pool
from headrace_shared.testing.jobs import Jobs, eventually
from headrace_shared.testing.scripted_provider import ScriptedProvider
from headrace_workers.execution import Again, Execution, Run
from headrace_workers.leases import Leases
from headrace_workers.steps.lease import Lease
from headrace_workers.watchdog import Watchdog

LEASE = timedelta(seconds=1)
PATIENCE = timedelta(seconds=90)
"""A process must start before."""
BLOCKING = """
import asyncio, os, signal
from headrace_shared import logs
from headrace_shared.settings import load_settings
from headrace_workers.service import open_worker

def block_the_loop():
    with open(os.environ["GATE"]) as gate:
        gate.read()

async def main():
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, block_the_loop)
    async with open_worker(load_settings()) as worker:
        await worker.main()

logs.configure()
asyncio.run(main())
"""


@pytest.fixture
def jobs(pool: Pool, dispatch: Dispatch) -> Jobs:
    return Jobs(pool, dispatch)


@pytest.mark.usefixtures("environment")
async def test_the_jobs_of_a_worker_whose_loop_stands_still_end_once_and_elsewhere(
    jobs: Jobs, silent: ScriptedProvider, tmp_path: Path
) -> None:
    gate, log = tmp_path / "gate", tmp_path / "log"
    os.mkfifo(gate)
    ids = await jobs.add(4, webhook="https://example.com/hook")
    blocking = (sys.executable, "-c", BLOCKING)
    async with worker(blocking, log=log, environment={"GATE": str(gate)}, lease_seconds=3) as blocked:
        await silent.arrived(4)
        blocked.send_signal(signal.SIGUSR1)
        async with worker(lease_seconds=3):
            await silent.arrived(8)
            silent.open.set()
            endings = await jobs.ended(ids, within=PATIENCE)
            # Opened for reading over there: this end can be opened at once, and closing it lets go.
            os.close(os.open(gate, os.O_WRONLY | os.O_NONBLOCK))
            await eventually(lambda: asyncio.to_thread(log.read_text), lambda text: "is back" in text)
            # It runs jobs again.
            (after,) = await jobs.add()
            await jobs.ended([after])
        blocked.terminate()
        assert await asyncio.wait_for(blocked.wait(), 30) == 0
    assert {(ending.job.state, ending.job.attempts, ending.job.crashes) for ending in endings} == {
        ("succeeded", 0, 1)
    }
    assert [(await jobs.row(job_id))["result_run"] for job_id in ids] == [2] * 4
    assert [len(await jobs.deliveries(job_id)) for job_id in ids] == [1] * 4
    assert len(silent.requests) == 9
    assert await jobs.spend() == await jobs.ledger()
    report = log.read_text()
    assert report.count("in block_the_loop") == 2  # when it was noticed, and when the leases were lost
    assert re.search(r"stood still for [0-2]\.\d.*stood still for a whole lease", report, re.DOTALL)


class Reports(logging.Handler):
    """What was logged; `released` is set when a message contains a word."""

    def __init__(self, word: str) -> None:
        super().__init__()
        self.word = word
        self.released = threading.Event()
        self.said: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record)
        if self.word in record.getMessage():
            self.released.set()


@pytest.fixture
async def reports() -> AsyncIterator[Reports]:
    handler = Reports("whole lease")
    logger = logging.getLogger("headrace_workers.watchdog")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


async def test_a_stall_is_reported_once_with_its_code_and_no_values(reports: Reports) -> None:
    stalls = asyncio.Queue[None]()
    watchdog = Watchdog(
        asyncio.get_running_loop(), lambda: timedelta(milliseconds=300), lambda: stalls.put_nowait(None)
    )

    def stand_still(secret: str) -> bool:
        return bool(secret) and reports.released.wait(30)

    with watchdog.watching():
        assert stand_still("sk-1234567890")
        await stalls.get()
    noticed, lost, back = reports.said
    assert noticed.getMessage().startswith("the event loop has stood still for 0.")
    assert "for a whole lease" in lost.getMessage()
    assert back.getMessage().startswith("the event loop is back after")
    for record in (noticed, lost):
        assert record.stack_info is not None
        assert "in stand_still\n    return bool(secret)" in record.stack_info
        assert "sk-1234567890" not in record.stack_info.replace('stand_still("sk-1234567890")', "")
    assert stalls.empty()


async def test_a_loop_that_turns_is_not_reported(reports: Reports) -> None:
    loop = asyncio.get_running_loop()
    lease = timedelta(seconds=30)
    asked = asyncio.Event()

    def shortest_lease() -> timedelta:
        loop.call_soon_threadsafe(asked.set)
        return lease

    with Watchdog(loop, shortest_lease, lambda: pytest.fail("it has not stood still")).watching():
        await asked.wait()
    assert reports.said == []


@pytest.fixture
async def claimed(pool: Pool, jobs: Jobs) -> ClaimedJob:
    (job_id,) = await jobs.add()
    return (await claims.claim_jobs(pool, [job_id], WorkerId("here"), LEASE)).jobs[0]


class Road:
    """Between the intent and the call the process stands still; then a heartbeat says something."""

    def __init__(self, job: ClaimedJob) -> None:
        self.now = 0.0
        self.job = job
        self.leases = Leases(lambda: self.now)
        self.waits = asyncio.Event()
        self.sent: list[Run] = []
        self.execution = Execution((self.stand_still, Lease(self.leases), self.send), self.settle)

    async def stand_still(self, run: Run) -> Run:
        self.now += LEASE.total_seconds()
        asyncio.get_running_loop().call_soon(self.waits.set)
        return run._replace(journalled=True)

    async def send(self, run: Run) -> Run:
        self.sent.append(run)
        return run.ended(Succeeded())

    async def settle(self, run: Run) -> Again | Outcome:
        assert run.outcome is not None
        assert run.journalled
        assert not run.sent
        return run.outcome


async def test_nothing_is_sent_for_a_run_that_lost_its_row_while_the_loop_stood_still(
    claimed: ClaimedJob,
) -> None:
    road = Road(claimed)
    running = asyncio.create_task(road.execution.run(claimed))
    await road.waits.wait()
    assert road.sent == []
    # As a heartbeat does that does not find the row: first the interruption, then the news.
    road.execution.interrupt(claimed, WaitReason.LOST_LEASE, running)
    road.leases.renew(road.now)
    assert await running == Snoozed(timedelta(0), WaitReason.LOST_LEASE)
    assert road.sent == []


async def test_a_run_that_has_kept_its_row_goes_on_when_a_heartbeat_says_so(claimed: ClaimedJob) -> None:
    road = Road(claimed)
    running = asyncio.create_task(road.execution.run(claimed))
    await road.waits.wait()
    assert road.sent == []
    road.leases.renew(road.now)
    assert await running == Succeeded()
    assert len(road.sent) == 1
