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
from uuid import UUID

from headrace_shared import logs
from headrace_shared.handlers import public_lane
from headrace_shared.ids import JobId, WorkerId
from headrace_shared.job import ClaimedJob
from headrace_shared.settings import Settings, load_settings
from headrace_shared.store import claims, feed
from headrace_shared.store.pool import UNREACHABLE
from headrace_workers.command import loop_factory
from headrace_workers.heartbeat import Heartbeat
from headrace_workers.parts import Parts, execution_of, open_parts
from headrace_workers.running import Running
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
            await _run_alone(parts, worker, job, stop)


async def _claim(settings: Settings, parts: Parts, worker: WorkerId, job_id: JobId) -> ClaimedJob | None:
    """Claim the job under the lease of its lane; None when somebody else was first."""
    abilities = parts.handlers.abilities
    found = await claims.look_up(parts.pool, [job_id], abilities)
    leases = parts.configured.now.configuration.lane_leases()
    for one in found:
        lease = leases.get(public_lane(one.queue.lane), settings.lease)
        taken = await claims.claim_jobs(parts.pool, [job_id], worker, lease, abilities=abilities, alone=True)
        return taken.jobs[0] if taken.jobs else None
    return None


async def _run_alone(parts: Parts, worker: WorkerId, job: ClaimedJob, stop: asyncio.Event) -> None:
    """Run the job until it has ended or was put back; the latter at once when told to stop."""
    running = Running(parts.running, execution_of(parts), parts.telemetry.metrics)
    task = running.start(job)
    stopping = asyncio.create_task(stop.wait(), name="stop")
    async with _kept(parts, worker, job, running):
        await asyncio.wait((task, stopping), return_when=asyncio.FIRST_COMPLETED)
        running.give_back()
        await task
        stopping.cancel()


@asynccontextmanager
async def _kept(parts: Parts, worker: WorkerId, job: ClaimedJob, running: Running) -> AsyncGenerator[None]:
    """Keep the lease, and hear of cancellations, while the job runs."""
    heartbeat = Heartbeat(
        parts.pool,
        parts.dispatch,
        worker,
        shortest_lease=lambda: job.lease,
        running=parts.running,
        interrupt=running.interrupt,
        introduce=lambda: (socket.gethostname(), 1, ()),
        follow=parts.configured.follow,
        leases=parts.leases,
    )
    loop = asyncio.get_running_loop()
    services = [
        loop.create_task(service) for service in (heartbeat.run(), parts.breakers.run(), parts.limiter.run())
    ]
    watchdog = Watchdog(loop, lambda: job.lease, parts.telemetry.metrics.loop_stalled)
    try:
        with watchdog.watching():
            yield
    finally:
        await parts.finisher.drain()
        await parts.limiter.drain()
        for service in services:
            service.cancel()
        await asyncio.gather(*services, return_exceptions=True)
        with contextlib.suppress(*UNREACHABLE):
            await feed.forget_worker(parts.pool, worker)


if __name__ == "__main__":
    sys.exit(main())
