"""Whether this process reaches Redis, and whether the fleet does without.

A worker that does not reach Redis says so in the store. When no live one does, the store begins
an epoch without Redis; one that is cut off alone changes nothing for the others, and claims nothing.
The first to reach Redis again ends that epoch.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable
from datetime import timedelta

from headrace_shared.budgets import Budgets
from headrace_shared.dispatch.connection import Redis
from headrace_shared.errors import DispatchUnavailable
from headrace_shared.ids import WorkerId
from headrace_shared.logs import Occasional
from headrace_shared.store import feed, money
from headrace_shared.store.pool import UNREACHABLE, Pool

_logger = logging.getLogger(__name__)
_occasionally = Occasional(_logger)
_random = random.SystemRandom()

INTERVAL = timedelta(seconds=1)
PATIENCE = timedelta(seconds=3)
"""How long Redis must have been away before the fleet is asked to do without."""

_BELIEVED = timedelta(seconds=15)
"""For how long the others believe that this worker reaches Redis, once it has said so."""
_PROBE_SECONDS = 2.0


class Reach:
    """One for a worker; it asks Redis for a write once a second.

    Args:
        pool: where the fleet agrees.
        redis: what is to be reached.
        budgets: their counters come back with Redis.
        worker: on whose behalf.
        patience: how long Redis must have been away before the fleet is asked to do without.
        clock: seconds, for what is compared with `patience`.

    """

    def __init__(
        self,
        pool: Pool,
        redis: Redis,
        budgets: Budgets,
        worker: WorkerId,
        *,
        patience: timedelta = PATIENCE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = pool
        self._redis = redis
        self._budgets = budgets
        self._worker = worker
        self._patience = patience.total_seconds()
        self._clock = clock
        self._reached = False
        self._reached_at = clock()
        self._said_at = 0.0
        self.without_redis = False
        """Whether jobs are to be claimed from the store: Redis is away, and the epoch is one without it."""

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            try:
                await self.look()
            except UNREACHABLE as error:
                _occasionally.warning("whether Redis is reached cannot be told to the store: %s", error)
            except Exception as error:  # noqa: BLE001 - an old server that took its place, for example
                _occasionally.warning("Redis cannot be looked for: %r", error)
            await asyncio.sleep(INTERVAL.total_seconds() * _random.uniform(0.8, 1.2))

    async def look(self) -> None:
        """Ask Redis once, and do what follows from the answer."""
        try:
            await self._redis.check_writable(seconds=_PROBE_SECONDS)
        except DispatchUnavailable as error:
            await self._missed(error)
        else:
            await self._answered()

    async def _missed(self, error: DispatchUnavailable) -> None:
        if self._reached:
            _logger.warning("Redis is away: %s", error)
        self._reached = False
        if self._clock() - self._reached_at < self._patience:
            return
        before, self.without_redis = self.without_redis, await money.degrade(self._pool, self._worker)
        if self.without_redis and not before:
            # They need not find that out with a hold, which waits for long where Redis hangs.
            await self._budgets.is_without_redis()
            _logger.warning("no worker reaches Redis: jobs are claimed, and money held, in PostgreSQL")

    async def _answered(self) -> None:
        self._reached_at = self._clock()
        if not self._reached or self._clock() - self._said_at > _BELIEVED.total_seconds() / 3:
            # Before anything else, so that one that is still cut off does not begin it again.
            if await feed.reach_dispatch(self._pool, self._worker, _BELIEVED):
                await self._budgets.resume()
            self._said_at = self._clock()
        if self.without_redis:
            _logger.warning("Redis is back")
        self._reached, self.without_redis = True, False


async def check_at_start(redis: Redis, pool: Pool, worker: WorkerId) -> None:
    """Let a worker start without Redis where the fleet runs without it.

    Raises:
        DispatchUnavailable: Redis is away here alone, or was never there: its address is wrong, perhaps.
        DispatchTooOld: it is not a version to work with.

    """
    try:
        await redis.check()
    except DispatchUnavailable as error:
        if (await money.epoch_in_force(pool)).number == 1 or not await money.degrade(pool, worker):
            raise
        _logger.warning("starting without Redis: %s", error)
