"""How a batch stands, looked at no more often than it is cheap to."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from datetime import timedelta

from headrace_producer.connections import Connections
from headrace_shared.ids import BatchId
from headrace_shared.store import feed
from headrace_shared.store.batches import BatchCost, Progress, batch_cost, batch_progress
from headrace_shared.store.pool import UNREACHABLE

_SHARE = 20
"""A look that took a second is not repeated for so many seconds."""

_SHORTEST = 0.5
_LONGEST = 2.0
_RATE_WINDOW = 15.0
_WITHOUT_WORKER = 3.0
"""Seconds until it is said that nobody works."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How a batch stands now."""

    target: int
    """Jobs that are waited for."""
    progress: Progress
    cost: BatchCost
    per_second: float = 0

    @property
    def left(self) -> timedelta | None:
        if self.per_second <= 0:
            return None
        return timedelta(seconds=(self.target - self.progress.ended) / self.per_second)

    @property
    def finished(self) -> bool:
        return self.progress.ended >= self.target


async def standing(connections: Connections, batch_id: BatchId, target: int) -> Standing:
    """Look at a batch once."""
    progress = await batch_progress(connections.pool, batch_id)
    return Standing(target, progress, await batch_cost(connections.pool, batch_id))


async def follow(
    connections: Connections, batch_id: BatchId, target: int, tell: Callable[[str], None]
) -> AsyncGenerator[Standing]:
    """Yield how a batch stands until that many of its jobs have ended; outages are waited out.

    Args:
        connections: where.
        batch_id: which.
        target: how many jobs.
        tell: is told what keeps the batch from going on.

    """
    watch = _Watch(connections, batch_id, target, tell)
    while True:
        now = await watch.look()
        if now is not None:
            yield now
            if now.finished:
                return
        await asyncio.sleep(watch.pause)


@dataclass(slots=True)
class _Watch:
    connections: Connections
    batch_id: BatchId
    target: int
    tell: Callable[[str], None]
    pause: float = _SHORTEST
    _cost: BatchCost | None = None
    _cost_due: float = 0
    _away: bool = False
    _began: float = field(default_factory=time.monotonic)
    _asked_for_workers: bool = False
    _history: deque[tuple[float, int]] = field(default_factory=deque[tuple[float, int]])

    async def look(self) -> Standing | None:
        """Return how the batch stands; None while the store is away."""
        began = time.monotonic()
        try:
            progress = await batch_progress(self.connections.pool, self.batch_id)
            self.pause = min(max(_SHORTEST, _SHARE * (time.monotonic() - began)), _LONGEST)
            cost = await self._known_cost(finished=progress.ended >= self.target)
            await self._ask_for_workers(progress)
        except UNREACHABLE as error:
            if not self._away:
                self.tell(f"PostgreSQL is away ({type(error).__name__}); its jobs are safe, waiting for it.")
            self._away, self.pause = True, 1.0
            return None
        self._away = False
        return Standing(self.target, progress, cost, self._pace(progress.ended))

    async def _known_cost(self, *, finished: bool) -> BatchCost:
        began = time.monotonic()
        if self._cost is None or finished or began >= self._cost_due:
            self._cost = await batch_cost(self.connections.pool, self.batch_id)
            now = time.monotonic()
            self._cost_due = now + _SHARE * (now - began)
        return self._cost

    async def _ask_for_workers(self, progress: Progress) -> None:
        waited = time.monotonic() - self._began
        if self._asked_for_workers or progress.running or waited < _WITHOUT_WORKER:
            return
        self._asked_for_workers = True
        if not await feed.live_workers(self.connections.pool):
            self.tell("No worker is running: start one with 'headrace worker'.")

    def _pace(self, ended: int) -> float:
        now = time.monotonic()
        self._history.append((now, ended))
        while now - self._history[0][0] > _RATE_WINDOW:
            self._history.popleft()
        since, before = self._history[0]
        return (ended - before) / (now - since) if now > since else 0
