"""What becomes of those that wait for a job's answer when that job leads no more."""

import asyncio
import logging
from collections.abc import Sequence

from headrace_shared.dispatch.dispatch import Dispatch, Entry
from headrace_shared.ids import JobId
from headrace_shared.store import flights
from headrace_shared.store.pool import Pool

_logger = logging.getLogger(__name__)


class Landing:
    """Lands flights: ends the followers with their leader, or gives one of them its place."""

    def __init__(self, pool: Pool, dispatch: Dispatch) -> None:
        self._pool = pool
        self._dispatch = dispatch

    async def land(self, leaders: Sequence[JobId]) -> None:
        """Land the flights of those of the jobs that lead no more.

        Raises:
            UNREACHABLE: the reaper finds what was not landed.
            DispatchUnavailable: it is landed, and Redis was not told: what is due is found by the feeder.

        """
        landed = await flights.land(self._pool, leaders)
        if not landed:
            return
        # One whose run has still to say that it waits is promoted as well.
        promoted = [Entry(one.queue, one.id) for one in landed if not one.state.ended]
        ended = [(Entry(one.queue, one.id), None) for one in landed if one.state.ended]
        await asyncio.gather(self._dispatch.wake(promoted), self._dispatch.finish(ended))

    async def land_lost(self) -> None:
        """Land what its worker did not live to land, or what somebody else than a worker ended."""
        leaders = await flights.lost(self._pool)
        if leaders:
            _logger.info("%d flights are landed late", len(leaders), extra={"action": "land"})
            await self.land(leaders)
