"""Keeps the leases of all jobs of a worker, in one statement and one Redis call.

The row's lease decides. A run that its row no longer knows is lost: its task is cancelled,
and nothing that it still writes changes anything but the bill. While Postgres is away
leases cannot be renewed; when the last renewal is a lease old, all of them are lost.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta

from headrace_shared.dispatch.dispatch import Dispatch, Entry
from headrace_shared.errors import DispatchUnavailable
from headrace_shared.ids import JobId, WorkerId
from headrace_shared.job import ClaimedJob
from headrace_shared.outcome import ErrorClass, WaitReason
from headrace_shared.store import feed, runs
from headrace_shared.store.pool import UNREACHABLE, Pool

_logger = logging.getLogger(__name__)

BEATS_PER_LEASE = 3
_PAUSE = 1.0

Interrupt = Callable[[JobId, WaitReason | ErrorClass], None]


class Heartbeat:
    """One for a worker; it sees the jobs that are running and interrupts those it must."""

    def __init__(
        self,
        pool: Pool,
        dispatch: Dispatch,
        worker: WorkerId,
        *,
        lease: timedelta,
        running: Mapping[JobId, ClaimedJob],
        interrupt: Interrupt,
        introduce: Callable[[], tuple[str, int, tuple[str, ...]]],
        follow: Callable[[int], Awaitable[None]],
    ) -> None:
        self._pool = pool
        self._dispatch = dispatch
        self._worker = worker
        self._lease = lease
        self._running = running
        self._interrupt = interrupt
        self._introduce = introduce
        self._follow = follow

    async def run(self) -> None:
        """Beat until cancelled."""
        lease = self._lease.total_seconds()
        renewed = time.monotonic()
        while True:
            began = time.monotonic()
            try:
                # A store that hangs is as bad as one that is away: the lease ends all the same.
                async with asyncio.timeout(max(lease / BEATS_PER_LEASE, renewed + lease - began)):
                    await self.beat()
                renewed = began
                pause = lease / BEATS_PER_LEASE
            except Exception as error:  # noqa: BLE001 - whatever it is, the leases end
                _log_failure(error)
                now = time.monotonic()
                if now - renewed >= lease:
                    for job_id in list(self._running):
                        self._interrupt(job_id, WaitReason.LOST_LEASE)
                pause = min(_PAUSE, lease / BEATS_PER_LEASE, max(renewed + lease - now, 0.05))
            await asyncio.sleep(pause)

    async def beat(self) -> None:
        """Renew all leases once, and take note of what was lost or is to be cancelled."""
        host, slots, lanes = self._introduce()
        version = await feed.register_worker(
            self._pool, self._worker, host=host, slots=slots, lanes=lanes, alive=2 * self._lease
        )
        # A claim says so too, but one of a lane that this worker does not know yet is never made.
        await self._follow(version)
        held = {job_id: job.run for job_id, job in self._running.items()}
        if not held:
            return
        kept = await runs.heartbeat(self._pool, list(held.items()), self._lease)
        for one in kept:
            if one.cancel_requested and one.id in self._running:
                self._interrupt(one.id, ErrorClass.CANCELLED)
        await self._lose(held.keys() - {one.id for one in kept}, held)
        await self._renew_in_dispatch([one.id for one in kept])

    async def _lose(self, lost: set[JobId], held: Mapping[JobId, int]) -> None:
        for job_id in lost:
            job = self._running.get(job_id)
            # One that has just finished is missing as well: it is not running any more.
            if job is not None and job.run == held[job_id]:
                self._interrupt(job_id, WaitReason.LOST_LEASE)

    async def _renew_in_dispatch(self, kept: list[JobId]) -> None:
        entries = [Entry(self._running[job_id].queue, job_id) for job_id in kept if job_id in self._running]
        try:
            await self._dispatch.renew(entries, self._lease)
        except DispatchUnavailable:
            # It cancels nothing: the rows' leases hold, and the ids come back with Redis.
            _logger.warning("leases were not renewed in the dispatch")


def _log_failure(error: Exception) -> None:
    if isinstance(error, UNREACHABLE):
        _logger.warning("leases could not be renewed: %s", type(error).__name__)
    else:
        _logger.error("leases could not be renewed", exc_info=error)
