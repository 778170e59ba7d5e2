"""Leave to make calls again: a share of the provider's successes, for the whole fleet together.

Whoever makes a call again while everybody else does the same keeps a provider down that would come
back. So a retry asks first, many of them in one Redis call; a first call never does, and neither
does a fallback, which is another target's first call.
"""

import random
import time
from collections import Counter, deque
from collections.abc import Sequence
from datetime import timedelta

from headrace_shared.batching import Batcher
from headrace_shared.dispatch import retries
from headrace_shared.dispatch.connection import Redis
from headrace_shared.errors import DispatchUnavailable
from headrace_workers.configured import Configured

_random = random.SystemRandom()

_LONG_WAIT = timedelta(seconds=30)
"""There may be more successes by then, and so more room than the pace of now."""

_QUICKER = 4
"""So much sooner than at that pace come those whose turn is later; together they would hold up others."""

_LONGEST_WAIT = timedelta(minutes=5)


class RetryBudget:
    """The part of one process in it."""

    def __init__(self, redis: Redis, configured: Configured) -> None:
        self._redis = redis
        self._configured = configured
        self._successes: Counter[str] = Counter()
        self._alone: dict[str, deque[float]] = {}
        self._asked = Batcher[str, timedelta | None](self._ask, max_size=1000)

    def succeeded(self, provider: str) -> None:
        """Count a call that was answered."""
        self._successes[provider] += 1

    def unshared(self, provider: str) -> int:
        """Return the successes that the fleet was not told of, once."""
        return self._successes.pop(provider, 0)

    async def wait_of(self, provider: str) -> timedelta | None:
        """Return how long a retry has to wait before it may ask again; None: it may go now, and counts."""
        return await self._asked.submit(provider)

    async def _ask(self, providers: Sequence[str]) -> Sequence[timedelta | None]:
        waits = {name: await self._waits_of(name, wanted) for name, wanted in Counter(providers).items()}
        return [waits[name].pop() for name in providers]

    async def _waits_of(self, provider: str, wanted: int) -> list[timedelta | None]:
        policy = self._configured.now.retries
        try:
            allowance = await retries.ask(
                self._redis, provider, wanted, share=policy.budget, floor=policy.floor
            )
        except DispatchUnavailable:
            allowance = self._allow_alone(provider, wanted, policy.floor)
        refused = wanted - allowance.granted
        # They are taken from the end: first those that may go, then whose turn comes next.
        return [
            *(_spread(allowance.wait + turn * allowance.pace) for turn in reversed(range(refused))),
            *[None] * allowance.granted,
        ]

    def _allow_alone(self, provider: str, wanted: int, floor: int) -> retries.Allowance:
        """Without Redis nobody knows of the others' retries: each process keeps to the floor."""
        now, made = time.monotonic(), self._alone.setdefault(provider, deque())
        while made and made[0] <= now - retries.WINDOW.total_seconds():
            made.popleft()
        granted = max(0, min(wanted, floor - len(made)))
        made.extend([now] * granted)
        pace = retries.WINDOW / floor
        return retries.Allowance(granted, pace, pace)


def _spread(wait: timedelta) -> timedelta:
    sooner = max(min(wait, _LONG_WAIT), wait / _QUICKER)
    return min(sooner, _LONGEST_WAIT) * (1 + 0.2 * _random.random())
