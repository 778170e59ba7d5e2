"""Limits without Redis: what was known last, divided by the workers that are alive."""

import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from headrace_shared.dispatch.limits import LONGEST_LEAD, AdmitRequest, Admitted, Standing, Wait, limiters_of
from headrace_shared.limits import Ceiling
from headrace_shared.store import feed
from headrace_shared.store.pool import UNREACHABLE, Database
from headrace_workers.configured import Configured

_ASK_EVERY = 5.0
_MORE = timedelta(milliseconds=250)
"""How long a call waits for another to end, where the number of those under way is limited."""


class Alone:
    """Buckets of one process, for the time in which it does not reach Redis.

    Args:
        configured: whose limits hold.
        database: knows which workers are alive.
        under_way: says how many calls of this process are on their way under a limiter.

    """

    def __init__(self, configured: Configured, database: Database, under_way: Callable[[str], int]) -> None:
        self._configured = configured
        self._database = database
        self._known: dict[str, Ceiling] = {}
        self._next: dict[tuple[str, str], float] = {}
        self._under_way = under_way
        self._workers = 1
        self._asked = -_ASK_EVERY

    def learn(self, standings: Sequence[Standing]) -> None:
        """Remember what is in force; Redis is there, so nothing is counted here."""
        for one in standings:
            self._known[one.limiter] = Ceiling(one.requests_per_minute, one.tokens_per_minute, one.concurrent)
        self._next.clear()

    async def admit(self, request: AdmitRequest) -> Admitted | Wait:
        """Let a call go at its moment, or say when to ask again."""
        await self._count_workers()
        now = time.monotonic()
        tokens = request.input_bound + request.output_bound
        names = limiters_of(request.target)
        go, gaps = now, dict[tuple[str, str], float]()
        for name in names:
            known = self._in_force(name)
            if known.concurrent and self._under_way(name) >= max(1, known.concurrent // self._workers):
                return Wait(_MORE)
            for kind, limit, cost in (
                ("requests", known.requests_per_minute, 1),
                ("tokens", known.tokens_per_minute, tokens),
            ):
                if limit:
                    gaps[name, kind] = cost * 60 * self._workers / limit
                    # A bucket begins empty: so many others begin at this moment as well.
                    go = max(go, self._next.setdefault((name, kind), now + gaps[name, kind]))
        if go > now + LONGEST_LEAD.total_seconds():
            return Wait(timedelta(seconds=go - now))
        for key, gap in gaps.items():
            self._next[key] = max(self._next[key], now) + gap
        return Admitted(timedelta(seconds=go - now), tokens)

    def _in_force(self, name: str) -> Ceiling:
        configured = self._configured.now.configuration.ceilings().get(name, Ceiling())
        known = self._known.get(name, Ceiling())
        return Ceiling(
            _least(configured.requests_per_minute, known.requests_per_minute),
            _least(configured.tokens_per_minute, known.tokens_per_minute),
            _least(configured.concurrent, known.concurrent),
        )

    async def _count_workers(self) -> None:
        if time.monotonic() - self._asked < _ASK_EVERY:
            return
        self._asked = time.monotonic()
        try:
            self._workers = max(1, len(await feed.live_workers(self._database)))
        except UNREACHABLE:
            return


def _least(one: int | None, other: int | None) -> int | None:
    return min((limit for limit in (one, other) if limit is not None), default=None)
