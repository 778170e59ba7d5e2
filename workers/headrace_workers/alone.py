"""A process that runs one job and nothing else: `python -m headrace_workers.alone JOB WORKER`.

A worker starts it for a job that is suspected of killing processes (`suspects.py`). It has the
worker's environment, claims the job under the given name, takes it through the same steps under
its own heartbeat, and ends. It feeds, reaps and delivers nothing.
"""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from uuid import UUID

from headrace_shared import logs
from headrace_shared.handlers import public_lane
from headrace_shared.ids import JobId, WorkerId
from headrace_shared.job import ClaimedJob
from headrace_shared.outcome import ErrorClass, Retry, Snoozed, WaitReason
from headrace_shared.settings import Settings, load_settings
from headrace_shared.store import feed, runs
from headrace_shared.store.pool import UNREACHABLE
from headrace_shared.telemetry import consumer_span
from headrace_workers.command import loop_factory
from headrace_workers.heartbeat import Heartbeat
from headrace_workers.service import Parts, execution_of, open_parts
from headrace_workers.suspects import COULD_NOT_RUN
from headrace_workers.watchdog import Watchdog

_logger = logging.getLogger(__name__)

_POOL_SIZE = 2


def main() -> int:
    """Run the job that the arguments name; return 0 unless it is not the job's doing."""
    job_id, worker = JobId(UUID(sys.argv[1])), WorkerId(sys.argv[2])
    logs.configure()
    try:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(_run(load_settings(), job_id, worker))
    except Exception:
        _logger.exception("job %s could not be run alone", job_id)
        return COULD_NOT_RUN
    return 0


async def _run(settings: Settings, job_id: JobId, worker: WorkerId) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with open_parts(settings, worker, pool_size=_POOL_SIZE) as parts:
        job = None if stop.is_set() else await _claim(settings, parts, worker, job_id)
        if job is not None:
            await _LoneRun(parts, worker, job).run(stop)


async def _claim(settings: Settings, parts: Parts, worker: WorkerId, job_id: JobId) -> ClaimedJob | None:
    """Claim the job under the lease of its lane; None when somebody else was first."""
    abilities = parts.handlers.abilities
    found = await runs.look_up(parts.pool, [job_id], abilities)
    leases = parts.configured.now.configuration.lane_leases()
    for one in found:
        lease = leases.get(public_lane(one.queue.lane), settings.lease)
        claims = await runs.claim_jobs(parts.pool, [job_id], worker, lease, abilities=abilities, alone=True)
        return claims.jobs[0] if claims.jobs else None
    return None


class _LoneRun:
    def __init__(self, parts: Parts, worker: WorkerId, job: ClaimedJob) -> None:
        self._parts = parts
        self._worker = worker
        self._job = job
        self._execution = execution_of(parts)
        self._task: asyncio.Task[None] | None = None

    async def run(self, stop: asyncio.Event) -> None:
        """Run the job until it has ended or was put back; the latter at once when told to stop."""
        loop = asyncio.get_running_loop()
        self._parts.running[self._job.id] = self._job
        self._task = task = loop.create_task(self._take_through(), name="job")
        stopping = loop.create_task(stop.wait(), name="stop")
        timer = None
        if self._job.time_left is not None:
            left = self._job.time_left.total_seconds()
            timer = loop.call_later(left, self._interrupt, self._job.id, ErrorClass.EXPIRED)
        async with self._kept():
            await asyncio.wait((task, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                self._interrupt(self._job.id, WaitReason.SHUTDOWN)
            await task
            if timer is not None:
                timer.cancel()
            stopping.cancel()

    async def _take_through(self) -> None:
        job, loop = self._job, asyncio.get_running_loop()
        began = loop.time()
        logs.bind_job(job.id, job.run, job.traceparent)
        with consumer_span(job) as span:
            outcome = await self._execution.run(job)
            span.ended(outcome)
        self._parts.running.pop(job.id, None)
        age = None if isinstance(outcome, Retry | Snoozed) else datetime.now(UTC) - job.created_at
        self._parts.telemetry.metrics.run_ended(
            job, outcome, ran=timedelta(seconds=loop.time() - began), age=age
        )

    def _interrupt(self, job_id: JobId, reason: WaitReason | ErrorClass) -> None:
        if job_id == self._job.id and self._task is not None and not self._task.done():
            self._execution.interrupt(self._job, reason, self._task)

    @asynccontextmanager
    async def _kept(self) -> AsyncGenerator[None]:
        """Keep the lease, and hear of cancellations, while the job runs."""
        parts = self._parts
        heartbeat = Heartbeat(
            parts.pool,
            parts.dispatch,
            self._worker,
            shortest_lease=lambda: self._job.lease,
            running=parts.running,
            interrupt=self._interrupt,
            introduce=lambda: (socket.gethostname(), 1, ()),
            follow=parts.configured.follow,
            leases=parts.leases,
        )
        loop = asyncio.get_running_loop()
        services = [loop.create_task(heartbeat.run()), loop.create_task(parts.breakers.run())]
        watchdog = Watchdog(loop, lambda: self._job.lease, parts.telemetry.metrics.loop_stalled)
        try:
            with watchdog.watching():
                yield
        finally:
            await parts.finisher.drain()
            for service in services:
                service.cancel()
            await asyncio.gather(*services, return_exceptions=True)
            with contextlib.suppress(*UNREACHABLE):
                await feed.forget_worker(parts.pool, self._worker)


if __name__ == "__main__":
    sys.exit(main())
