"""Jobs that wait for the same thing come back one after the other, and not all at once."""

import time
from datetime import timedelta

APART = timedelta(milliseconds=10)
"""Between two jobs of one process that come back for the same thing."""

LONGEST = timedelta(minutes=5)

_KEPT = 10_000


class Turns:
    """Says when each of the jobs that this process puts back may try again.

    A job that is claimed only to be put back costs two writes: however many wait, only so many of
    them do that in a second.
    """

    def __init__(self, soonest: timedelta) -> None:
        self._soonest = soonest.total_seconds()
        self._next: dict[str, float] = {}
        self._said: dict[str, float] = {}

    def take(self, what: str) -> timedelta:
        """Return in how long the next job may try that waits for `what`."""
        now = time.monotonic()
        turn = max(self._next.get(what, 0) + APART.total_seconds(), now + self._soonest)
        turn = min(turn, now + LONGEST.total_seconds())
        _note(self._next, what, turn)
        return timedelta(seconds=turn - now)

    def is_news(self, what: str) -> bool:
        """Say whether it is time to tell others, once for all jobs that find it out at the same time."""
        now = time.monotonic()
        if self._said.get(what, 0) > now:
            return False
        _note(self._said, what, now + self._soonest / 2)
        return True


def _note(times: dict[str, float], what: str, until: float) -> None:
    if len(times) >= _KEPT:
        now = time.monotonic()
        for name in [name for name, at in times.items() if at <= now]:
            del times[name]
    times[what] = until
