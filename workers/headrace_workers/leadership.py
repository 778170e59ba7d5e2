"""Work that one process of the fleet does for all: elected by a row, lost without harm."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from datetime import timedelta

from headrace_shared.errors import DispatchUnavailable
from headrace_shared.ids import WorkerId
from headrace_shared.logs import Occasional
from headrace_shared.store import feed
from headrace_shared.store.pool import UNREACHABLE, Pool

_logger = logging.getLogger(__name__)

_CAMPAIGN = timedelta(seconds=1)


class Leadership:
    """Runs one duty, turn by turn, for as long as this process holds the role.

    Args:
        pool: where the role's row is.
        worker: who stands for it.
        role: `feeder`, `reaper` or `alerts`.
        term: how long the role is held without being renewed.
        turn: does the duty once and returns how long to wait before the next turn.
        wake: returns early when there is reason for a turn before that.
        campaign: how often one that does not hold the role asks for it.

    """

    def __init__(
        self,
        pool: Pool,
        worker: WorkerId,
        role: str,
        *,
        term: timedelta,
        turn: Callable[[], Awaitable[timedelta]],
        wake: Callable[[timedelta], Awaitable[None]],
        campaign: timedelta = _CAMPAIGN,
    ) -> None:
        self._pool = pool
        self._worker = worker
        self._role = role
        self._term = term
        self._turn = turn
        self._wake = wake
        self._campaign = campaign.total_seconds()
        self._occasionally = Occasional(_logger)

    async def run(self) -> None:
        """Stand for the role, and do its duty while holding it, until cancelled."""
        try:
            while True:
                try:
                    if await feed.lead(self._pool, self._role, self._worker, self._term):
                        await self._wake(await self._turn())
                    else:
                        await asyncio.sleep(self._campaign)
                except (DispatchUnavailable, *UNREACHABLE) as error:
                    self._occasionally.warning("%s waits: %s", self._role, error)
                    await asyncio.sleep(_CAMPAIGN.total_seconds())
                except Exception:
                    # One bad turn must not cost the fleet a worker for each that takes the role over.
                    _logger.exception("a turn of the %s failed", self._role)
                    await asyncio.sleep(_CAMPAIGN.total_seconds())
        finally:
            with contextlib.suppress(*UNREACHABLE):
                await asyncio.shield(feed.resign(self._pool, self._role, self._worker))
