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
from headrace_shared.logs import Occasional
from headrace_shared.outcome import ErrorClass, WaitReason
from headrace_shared.store import claims, feed
from headrace_shared.store.pool import UNREACHABLE, Pool
from headrace_workers.leases import Leases

_logger = logging.getLogger(__name__)
_occasionally = Occasional(_logger)

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
        shortest_lease: Callable[[], timedelta],
        running: Mapping[JobId, ClaimedJob],
        interrupt: Interrupt,
        introduce: Callable[[], tuple[str, int, tuple[str, ...]]],
        follow: Callable[[int], Awaitable[None]],
        leases: Leases,
    ) -> None:
        self._pool = pool
        self._dispatch = dispatch
        self._worker = worker
        self._shortest_lease = shortest_lease
        self._running = running
        self._interrupt = interrupt
        self._introduce = introduce
        self._follow = follow
        self._leases = leases

    async def run(self) -> None:
        """Beat until cancelled."""
        renewed = time.monotonic()
        while True:
            began = time.monotonic()
            lease = self._shortest_lease().total_seconds()
            try:
                # A store that hangs is as bad as one that is away: the lease ends all the same.
                async with asyncio.timeout(max(lease / BEATS_PER_LEASE, renewed + lease - began)):
                    await self.beat()
                renewed = began
                # Those that were lost are interrupted by now: who waits here sends nothing for them.
                self._leases.renew(began)
                pause = lease / BEATS_PER_LEASE
            except Exception as error:  # noqa: BLE001 - whatever it is, the leases end
                _log_failure(error)
                now = time.monotonic()
                self._give_up(timedelta(seconds=now - renewed))
                pause = _pause(lease, renewed + lease - now)
            await asyncio.sleep(pause)

    def _give_up(self, unrenewed: timedelta) -> None:
        for job in list(self._running.values()):
            if unrenewed >= job.lease:
                self._interrupt(job.id, WaitReason.LOST_LEASE)

    async def beat(self) -> None:
        """Renew all leases once, and take note of what was lost or is to be cancelled."""
        host, slots, lanes = self._introduce()
        version = await feed.register_worker(
            self._pool, self._worker, host=host, slots=slots, lanes=lanes, alive=2 * self._shortest_lease()
        )
        # A claim says so too, but one of a lane that this worker does not know yet is never made.
        await self._follow(version)
        held = dict(self._running)
        if not held:
            return
        kept = await claims.heartbeat(self._pool, list(held.values()))
        for one in kept:
            if one.cancel_requested and one.id in self._running:
                self._interrupt(one.id, ErrorClass.CANCELLED)
        await self._lose(held.keys() - {one.id for one in kept}, held)
        await self._renew_in_dispatch([one.id for one in kept])

    async def _lose(self, lost: set[JobId], held: Mapping[JobId, ClaimedJob]) -> None:
        for job_id in lost:
            # One that has just finished is missing as well: it is not running any more.
            if self._running.get(job_id) is held[job_id]:
                self._interrupt(job_id, WaitReason.LOST_LEASE)

    async def _renew_in_dispatch(self, kept: list[JobId]) -> None:
        jobs = [self._running[job_id] for job_id in kept if job_id in self._running]
        try:
            # A server that hangs must not make the next beat late.
            async with asyncio.timeout(self._shortest_lease().total_seconds() / (2 * BEATS_PER_LEASE)):
                await self._dispatch.renew([(Entry(job.queue, job.id), job.lease) for job in jobs])
        except (DispatchUnavailable, TimeoutError):
            # It cancels nothing: the rows' leases hold, and the ids come back with Redis.
            _occasionally.warning("leases were not renewed in the dispatch")


def _pause(lease: float, left: float) -> float:
    """Return how long to wait after a failure: never past the end of the leases while they last."""
    pause = min(_PAUSE, lease / BEATS_PER_LEASE)
    return min(pause, left) if left > 0 else pause


def _log_failure(error: Exception) -> None:
    if isinstance(error, UNREACHABLE):
        _occasionally.warning("leases could not be renewed: %s", type(error).__name__)
    else:
        _logger.error("leases could not be renewed", exc_info=error)
