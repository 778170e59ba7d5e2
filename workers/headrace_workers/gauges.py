"""What can be read off while a worker runs: its own state, and how the queues and budgets stand."""

import asyncio
import logging
import time
from datetime import timedelta

from headrace_shared.budgets import Budgets
from headrace_shared.errors import DispatchUnavailable
from headrace_shared.ids import JobId
from headrace_shared.job import ClaimedJob
from headrace_shared.logs import Occasional
from headrace_shared.store import feed, pauses
from headrace_shared.store.pool import UNREACHABLE, Pool
from headrace_workers.breaker import Breakers
from headrace_workers.telemetry import Metrics

_occasionally = Occasional(logging.getLogger(__name__))

INTERVAL = timedelta(seconds=15)
"""Between two looks at the queues and budgets."""

_DUTY = 20
"""A look that takes long is followed by a pause of this many times as long, at least."""


class Gauges:
    """Sets the gauges of one process. Who has no metrics port does not need it."""

    def __init__(
        self,
        metrics: Metrics,
        pool: Pool,
        budgets: Budgets,
        breakers: Breakers,
        running: dict[JobId, ClaimedJob],
    ) -> None:
        self._metrics = metrics
        self._pool = pool
        self._budgets = budgets
        self._breakers = breakers
        self._running = running
        metrics.watch(self._look_here)

    def _look_here(self) -> None:
        self._metrics.running(len(self._running))
        self._metrics.pool_in_use(self._pool.get_size() - self._pool.get_idle_size())
        for breaker in self._breakers.all():
            self._metrics.breaker(breaker.target, breaker.state)

    async def run(self) -> None:
        """Look at the servers until cancelled."""
        while True:
            began = time.monotonic()
            await self._look_at_postgres()
            await self._look_at_redis()
            took = timedelta(seconds=time.monotonic() - began)
            await asyncio.sleep(max(INTERVAL, _DUTY * took).total_seconds())

    async def _look_at_postgres(self) -> None:
        try:
            for depth in await feed.depths(self._pool):
                self._metrics.waiting(depth.lane, depth.jobs, depth.oldest)
            self._metrics.paused(await pauses.in_force(self._pool))
            self._metrics.server_up("postgres", up=True)
        except UNREACHABLE as error:
            self._metrics.server_up("postgres", up=False)
            _occasionally.warning("gauges wait for PostgreSQL: %s", error)

    async def _look_at_redis(self) -> None:
        try:
            self._metrics.budgets(await self._budgets.view())
            self._metrics.server_up("redis", up=True)
        except (DispatchUnavailable, *UNREACHABLE) as error:
            self._metrics.server_up("redis", up=False)
            _occasionally.warning("gauges wait for Redis: %s", error)
