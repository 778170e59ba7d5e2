"""Redis is told about jobs that Postgres has already, as well as it can be told."""

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from datetime import timedelta

from headrace_shared.batching import Batcher
from headrace_shared.dispatch.dispatch import Dispatch, Entry
from headrace_shared.errors import DispatchError

_PATIENCE_SECONDS = 2.0
_PAUSE_SECONDS = 1.0
"""A Redis that was away just now is not asked again for so long: the feeder finds the jobs anyway."""

_logger = logging.getLogger(__name__)


class Announcer:
    """Puts new jobs into the dispatch and takes ended ones out; nothing depends on its success."""

    def __init__(self, dispatch: Dispatch) -> None:
        self._dispatch = dispatch
        self._away_until = 0.0
        self._pushes = Batcher(self._push)

    async def enqueued(self, entries: Sequence[tuple[Entry, timedelta]]) -> None:
        """Push new ids; those of callers at the same time in one round trip."""
        if entries and not self._is_away():
            await self._try(self._pushes.submit(entries))

    async def ended(self, entries: Sequence[Entry]) -> None:
        if entries and not self._is_away():
            await self._try(self._dispatch.finish([(entry, None) for entry in entries]))

    async def _push(self, batch: Sequence[Sequence[tuple[Entry, timedelta]]]) -> list[None]:
        await self._dispatch.push([one for entries in batch for one in entries])
        return [None] * len(batch)

    def _is_away(self) -> bool:
        return asyncio.get_running_loop().time() < self._away_until

    async def _try(self, telling: Awaitable[None]) -> None:
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                await telling
        except (DispatchError, TimeoutError) as error:
            if not self._away_until:
                _logger.warning("Redis is not told of new jobs, workers find them later: %s", error)
            self._away_until = asyncio.get_running_loop().time() + _PAUSE_SECONDS
        else:
            self._away_until = 0.0
