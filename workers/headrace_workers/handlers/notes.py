"""What a handler's run writes down about itself on its way: steps at once, progress now and then."""

import asyncio
import contextlib
import logging
from datetime import timedelta

from headrace_shared.job import ClaimedJob
from headrace_shared.store import checkpoints
from headrace_shared.store.pool import UNREACHABLE, Database

_logger = logging.getLogger(__name__)

INTERVAL = timedelta(seconds=1)
"""Between two writes of a job's progress."""

_MAX_PAUSE = 2.0


class Notes:
    """Those of one run; what a run writes that has lost its row changes nothing."""

    def __init__(self, database: Database, job: ClaimedJob) -> None:
        self._database = database
        self._job = job
        self._told: tuple[float, str | None] | None = None
        self._telling: asyncio.Task[None] | None = None

    async def keep(self, name: str, value: bytes) -> bool:
        """Write what a step came to; false when the run has lost its row.

        While the store is away it is tried again: the work is done, and the lease ends the wait.
        """
        pause = 0.05
        while True:
            try:
                return await checkpoints.keep(self._database, self._job.id, self._job.run, name, value)
            except UNREACHABLE as error:
                _logger.warning("the store is away (%s); a step waits", type(error).__name__)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _MAX_PAUSE)

    def tell(self, progress: float, note: str | None) -> None:
        """Write how far the run is, now or at the end of the interval."""
        self._told = progress, note
        if self._telling is None:
            self._telling = asyncio.create_task(self._tell(), name=f"progress-{self._job.id}")

    async def close(self) -> None:
        """Write nothing more."""
        if self._telling is not None:
            self._telling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([self._telling])

    async def _tell(self) -> None:
        while self._told is not None:
            (progress, note), self._told = self._told, None
            with contextlib.suppress(*UNREACHABLE):
                await checkpoints.tell(self._database, self._job.id, self._job.run, progress, note)
            await asyncio.sleep(INTERVAL.total_seconds())
        self._telling = None
