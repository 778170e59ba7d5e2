"""Which of several targets a call goes to: one small function for each strategy."""

import math
import random
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Protocol, assert_never

from headrace_shared.money import NanoUSD
from headrace_shared.routes import Strategy, Target

_random = random.SystemRandom()


class Facts(Protocol):
    """What is known of targets when one of them is chosen.

    Loads and latencies are those that this process sees: the fleet's spread is even because each
    of its processes spreads evenly.
    """

    def weight(self, target: Target) -> int:
        """Return its share, from the route."""
        ...

    def under_way(self, target: Target) -> int:
        """Return how many calls are on their way to it."""
        ...

    def latency(self, target: Target) -> timedelta | None:
        """Return how long its answers took of late; None when there were none."""
        ...

    def cost(self, target: Target) -> NanoUSD | None:
        """Return the most that this request costs there; None where nobody knows its price."""
        ...


Choose = Callable[[Sequence[Target], Facts], Target]
"""Takes one of the targets, of which there is at least one."""


def strategy_of(strategy: Strategy) -> Choose:
    match strategy:
        case Strategy.WEIGHTED:
            return weighted
        case Strategy.LEAST_LOADED:
            return least_loaded
        case Strategy.LATENCY_AWARE:
            return latency_aware
        case Strategy.LOWEST_COST:
            return lowest_cost
        case _:
            assert_never(strategy)


def weighted(targets: Sequence[Target], facts: Facts) -> Target:
    """Draw one by the weights."""
    return _random.choices(targets, [facts.weight(target) for target in targets])[0]


def least_loaded(targets: Sequence[Target], facts: Facts) -> Target:
    """Take the one with the fewest calls under way for its weight."""
    return min(targets, key=lambda one: (facts.under_way(one) / facts.weight(one), _random.random()))


def latency_aware(targets: Sequence[Target], facts: Facts) -> Target:
    """Take the one that answers soonest; one of which nothing is known gets a single call to learn from."""

    def seconds(target: Target) -> float:
        latency = facts.latency(target)
        if latency is None:
            return math.inf if facts.under_way(target) else -math.inf
        return latency.total_seconds()

    return min(targets, key=lambda one: (seconds(one), _random.random() / facts.weight(one)))


def lowest_cost(targets: Sequence[Target], facts: Facts) -> Target:
    """Take the one at which this request can cost least."""

    def nano(target: Target) -> float:
        cost = facts.cost(target)
        return math.inf if cost is None else cost

    return min(targets, key=lambda one: (nano(one), _random.random() / facts.weight(one)))
