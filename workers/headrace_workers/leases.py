"""What a process knows, by its own clock, of the leases it holds."""

import asyncio
import time
from collections.abc import Callable

from headrace_shared.job import ClaimedJob


class Leases:
    """Held for certain for as long as the last heartbeat that came through says.

    After a loop that stood still, a process that was frozen, or a store that was away, they may
    have ended, and the rows may be somebody else's: only another heartbeat knows.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._renewed = clock()
        self._next = asyncio.Event()

    def renew(self, began: float) -> None:
        """Take note of a heartbeat that came through, by `time.monotonic()` at its beginning."""
        self._renewed = began
        self._next.set()
        self._next = asyncio.Event()

    def are_certain(self, job: ClaimedJob) -> bool:
        """Say whether nobody else can have got the job."""
        return self._clock() - self._renewed < job.lease.total_seconds()

    async def become_certain(self, job: ClaimedJob) -> None:
        """Wait for a heartbeat if the lease may have ended; it interrupts the run that was lost."""
        while not self.are_certain(job):
            await self._next.wait()
