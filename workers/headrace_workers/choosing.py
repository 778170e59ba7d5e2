"""Which target a call goes to: by the route's strategy, past those that are in trouble.

What steers it is what this process knows: the state of the fleet's breakers, how long targets make
callers wait for their limits, the calls under way here, and how long answers took here.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from headrace_shared.money import NanoUSD
from headrace_shared.routes import Route, Target, Trouble
from headrace_workers.breaker import Breakers
from headrace_workers.configured import Configured
from headrace_workers.replies import Answered, Reply
from headrace_workers.strategies import strategy_of

_NEWEST_SHARE = 0.2
"""Of the last answer in a target's latency."""

_LATENCY_KEPT = timedelta(seconds=30)
"""After so long without an answer a target's latency is unknown again: it may be well by now."""

_NOTHING = timedelta(0)

Cost = Callable[[Target], NanoUSD | None]
"""Says the most that a call costs at a target; None where nobody knows."""


class Waits(Protocol):
    """How long targets make callers wait for their limits."""

    def wait_of(self, target: Target) -> timedelta:
        """Return the wait as far as it is known here; nothing, where none is known."""
        ...


class NoWaits:
    def wait_of(self, target: Target) -> timedelta:
        del target
        return _NOTHING


@dataclass(frozen=True, slots=True)
class Met:
    """What a call of the present run met at a target."""

    target: Target
    trouble: Trouble


class Choosing:
    """The choices of one process."""

    def __init__(self, configured: Configured, breakers: Breakers, waits: Waits | None = None) -> None:
        self._configured = configured
        self._breakers = breakers
        self._waits = waits or NoWaits()
        self._under_way: Counter[Target] = Counter()
        self._latencies: dict[Target, tuple[float, float]] = {}

    def first(self, route: Route, met: Sequence[Met], cost: Cost) -> Target:
        """Return who is called: one that can take a call now, else one to wait for.

        Args:
            route: whose target it is.
            met: what earlier calls of the same run met.
            cost: the most that the call costs at a target; None where nobody knows.

        """
        if not met and len(route.targets) == 1 and not route.fallbacks:
            return route.targets[0]
        ready = self.next(route, met, cost)
        if ready is not None:
            return ready
        targets, fallbacks = self._left(route, met)
        return self._choose(route, targets or fallbacks or route.targets, cost)

    def next(self, route: Route, met: Sequence[Met], cost: Cost) -> Target | None:
        """Return who can take a call now and has met nothing in this run; None when nobody is left."""
        targets, fallbacks = self._left(route, met)
        ready = [target for target in targets if self._trouble_of(target) is None]
        if ready:
            unhindered = [target for target in ready if not self._waits.wait_of(target)]
            return self._choose(route, unhindered or ready, cost)
        return next((target for target in fallbacks if self._trouble_of(target) is None), None)

    def is_in_trouble(self, target: Target) -> bool:
        """Say whether a call to it would only wait."""
        return self._trouble_of(target) is not None

    def taken(self, target: Target) -> None:
        """Count a call that is on its way to a target."""
        self._under_way[target] += 1

    def ended(self, target: Target, reply: Reply | None) -> None:
        """Count it no more, and learn from how it was answered."""
        self._under_way[target] -= 1
        if not isinstance(reply, Answered):
            return
        known, now = self.latency(target), time.monotonic()
        newest = reply.latency.total_seconds()
        if known is not None:
            newest = known.total_seconds() * (1 - _NEWEST_SHARE) + newest * _NEWEST_SHARE
        self._latencies[target] = (newest, now)

    def under_way(self, target: Target) -> int:
        return self._under_way[target]

    def latency(self, target: Target) -> timedelta | None:
        seconds, learnt = self._latencies.get(target, (0.0, -_LATENCY_KEPT.total_seconds()))
        if time.monotonic() - learnt >= _LATENCY_KEPT.total_seconds():
            return None
        return timedelta(seconds=seconds)

    def _left(self, route: Route, met: Sequence[Met]) -> tuple[list[Target], list[Target]]:
        """Return the targets and, after them, the fallbacks that have met nothing in this run."""
        passed, troubles = {one.target for one in met}, {one.trouble for one in met}
        lasting = {trouble for trouble in troubles if trouble.is_of_the_request}
        # The route's targets are one model: what one of them says of a request, all of them say.
        targets = [] if lasting else [target for target in route.targets if target not in passed]
        now = {trouble for target in targets if (trouble := self._trouble_of(target)) is not None}
        fallbacks = route.fallbacks_on(lasting or troubles | now)
        return targets, [target for target in fallbacks if target not in passed]

    def _trouble_of(self, target: Target) -> Trouble | None:
        if self._breakers.of(target).is_open:
            return Trouble.DOWN
        longest = self._configured.now.retries.slot_wait
        return Trouble.RATE_LIMITED if self._waits.wait_of(target) > longest else None

    def _choose(self, route: Route, targets: Sequence[Target], cost: Cost) -> Target:
        if len(targets) == 1:
            return targets[0]
        return strategy_of(route.strategy)(targets, _Facts(route, cost, self))


class _Facts:
    def __init__(self, route: Route, cost: Cost, choosing: Choosing) -> None:
        self._weights = dict(zip(route.targets, route.weights, strict=True))
        self._cost = cost
        self.under_way = choosing.under_way
        self.latency = choosing.latency

    def weight(self, target: Target) -> int:
        return self._weights.get(target, 1)

    def cost(self, target: Target) -> NanoUSD | None:
        return self._cost(target)
