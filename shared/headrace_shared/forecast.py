"""When a budget will be spent, at the pace of late.

The pace is an average over time in which older money counts ever less: what was spent one
memory ago counts e times less than what is spent now. The memory is an hour for a day and for a total,
six hours for a week, a day for a month. While less than that has been watched, the pace is the average of
what has.
"""

import math
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from headrace_shared.money import NanoUSD
from headrace_shared.store.money import BudgetState, WindowKind

_MEMORY = {"week": timedelta(hours=6), "month": timedelta(days=1)}
_SHORT_MEMORY = timedelta(hours=1)

_ENOUGH = 6
"""A sixth of the memory must have been watched before anybody is told what is to be expected."""

_FAR = timedelta(days=3650)
"""What is spent later than that is not spent."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a budget was spent, as of one moment."""

    window: str
    """The name of the window that was looked at."""
    used: NanoUSD
    """Settled and in suspense in that window."""
    at: datetime
    since: datetime
    rate: float
    """Nano-USD a second, to be divided by `weight`."""
    weight: float
    """The share of an endless past that was watched: from 0, towards 1."""

    @property
    def per_second(self) -> float:
        """Nano-USD a second, never less than none: suspense that turned out free brings money back."""
        return max(0.0, self.rate / self.weight) if self.weight else 0.0

    @property
    def observed(self) -> timedelta:
        return self.at - self.since


@dataclass(frozen=True, slots=True)
class Forecast:
    """What becomes of a budget if it is spent on as of late."""

    per_hour: NanoUSD
    exhausted_in: timedelta | None
    """None: not before its window ends, or not in ten years."""
    used_at_end: NanoUSD | None
    """What its window would have used at its end if nothing stopped it; None: it never ends."""
    observed: timedelta
    """How long the pace was watched."""


def memory_of(kind: WindowKind) -> timedelta:
    """Return the time after which spent money counts e times less."""
    return _MEMORY.get(kind, _SHORT_MEMORY)


def is_enough(kind: WindowKind, forecast: Forecast) -> bool:
    """Say whether the pace was watched for long enough to warn by it."""
    return forecast.observed * _ENOUGH >= memory_of(kind)


def used(state: BudgetState) -> NanoUSD:
    return NanoUSD(state.settled + state.suspense)


def follow(before: Pace | None, state: BudgetState, now: datetime) -> Pace:
    """Return the pace with what was spent since it was looked at last."""
    if before is None:
        return Pace(state.window, used(state), now, now, 0.0, 0.0)
    passed = (now - before.at).total_seconds()
    if passed <= 0:
        return before
    # In a new window all of it is new; what the old one spent after the last look is left out.
    spent = used(state) - (before.used if before.window == state.window else 0)
    kept = math.exp(-passed / memory_of(state.kind).total_seconds())
    return replace(
        before,
        window=state.window,
        used=used(state),
        at=now,
        rate=before.rate * kept + spent / passed * (1 - kept),
        weight=before.weight * kept + 1 - kept,
    )


def forecast(pace: Pace, state: BudgetState, ends_in: timedelta | None) -> Forecast:
    """Say what becomes of a budget whose pace has just been followed.

    Args:
        pace: as of now.
        state: of the same moment.
        ends_in: until its window ends; None for one that never does.

    """
    rate, left = pace.per_second, max(0, state.limit - used(state))
    soonest = min(ends_in or _FAR, _FAR)
    exhausted_in = timedelta(seconds=left / rate) if rate * soonest.total_seconds() > left else None
    at_end = None
    if ends_in is not None:
        at_end = NanoUSD(used(state) + round(rate * ends_in.total_seconds()))
    return Forecast(
        NanoUSD(round(rate * 3600)), exhausted_in if left else timedelta(0), at_end, pace.observed
    )
