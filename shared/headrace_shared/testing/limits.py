"""The limits per minute that a simulated provider keeps for each model, and how it reports them."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a model stands after a request asked for its share."""

    headers: dict[str, str]
    exceeded: str | None
    """The limit that has no room, "requests" or "tokens"; nothing was taken then."""
    wait: float
    """Seconds until there is room."""


class Enforcement(StrEnum):
    """How a limit per minute is kept."""

    BUCKET = "bucket"
    """Refilled evenly, and holding a minute's worth."""
    SECOND = "second"
    """In each second of the clock a sixtieth of it."""
    MINUTE = "minute"
    """In each minute of the clock all of it."""


class RateLimits:
    """The limits of requests and of tokens, kept for each model in one of three ways.

    Args:
        requests_per_minute: None is no limit.
        tokens_per_minute: likewise.
        enforcement: how both are kept.
        clock: seconds, of any beginning.

    """

    def __init__(
        self,
        requests_per_minute: int | None,
        tokens_per_minute: int | None,
        enforcement: Enforcement = Enforcement.BUCKET,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.kept = requests_per_minute is not None or tokens_per_minute is not None
        self._requests = requests_per_minute or _UNLIMITED
        self._tokens = tokens_per_minute or _UNLIMITED
        self._clock = clock
        self._window = {Enforcement.BUCKET: None, Enforcement.SECOND: 1.0, Enforcement.MINUTE: 60.0}[
            enforcement
        ]
        self._meters: dict[str, tuple[_Meter, _Meter]] = {}
        self._open = Standing(_headers(self._meter(self._requests), self._meter(self._tokens)), None, 0)

    def take(self, model: str, tokens: int) -> Standing:
        """Take one request and its tokens when both fit, and say where the model stands."""
        if not self.kept:
            return self._open
        if model not in self._meters:
            self._meters[model] = self._meter(self._requests), self._meter(self._tokens)
        requests, room = self._meters[model]
        waits = {"requests": requests.wait_for(1), "tokens": room.wait_for(tokens)}
        exceeded, wait = max(waits.items(), key=lambda item: item[1])
        if wait <= 0:
            requests.left -= 1
            room.left -= tokens
        return Standing(_headers(requests, room), exceeded if wait > 0 else None, max(0.0, wait))

    def _meter(self, limit: int) -> "_Meter":
        return (
            _Bucket(limit, self._clock) if self._window is None else _Window(limit, self._window, self._clock)
        )


_UNLIMITED = 1_000_000_000
"""What the headers say when no limit is kept."""


class _Meter(Protocol):
    limit: int
    left: float

    @property
    def whole_in(self) -> float:
        """Seconds until nothing of it is used."""
        ...

    def wait_for(self, amount: int) -> float:
        """Return the seconds until there is room for an amount; one that never fits needs all there is."""
        ...


class _Bucket:
    def __init__(self, limit: int, clock: Callable[[], float]) -> None:
        self.limit = limit
        self.left = float(limit)
        self._clock = clock
        self._at = clock()

    @property
    def whole_in(self) -> float:
        return (self.limit - self.left) * 60 / self.limit

    def wait_for(self, amount: int) -> float:
        now = self._clock()
        self.left = min(self.limit, self.left + (now - self._at) * self.limit / 60)
        self._at = now
        return (min(amount, self.limit) - self.left) * 60 / self.limit


class _Window:
    def __init__(self, limit: int, seconds: float, clock: Callable[[], float]) -> None:
        self.limit = limit
        self._most: float = limit * seconds / 60
        self.left: float = self._most
        self._seconds = seconds
        self._clock = clock
        self._begun: float = 0.0

    @property
    def whole_in(self) -> float:
        return max(0.0, self._begun + self._seconds - self._clock())

    def wait_for(self, amount: int) -> float:
        begun = math.floor(self._clock() / self._seconds) * self._seconds
        if begun != self._begun:
            self._begun, self.left = begun, self._most
        return 0.0 if min(amount, self._most) <= self.left else max(self.whole_in, 0.001)


def _headers(requests: _Meter, tokens: _Meter) -> dict[str, str]:
    headers: dict[str, str] = {}
    for name, meter in (("requests", requests), ("tokens", tokens)):
        headers[f"x-ratelimit-limit-{name}"] = str(meter.limit)
        headers[f"x-ratelimit-remaining-{name}"] = str(max(0, int(meter.left)))
        headers[f"x-ratelimit-reset-{name}"] = _duration(meter.whole_in)
    return headers


def _duration(seconds: float) -> str:
    """Return seconds as the provider writes them: 12ms, 1.5s, 6m0s."""
    if seconds < 1:
        return f"{max(0, math.ceil(seconds * 1000))}ms"
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)}m{int(rest)}s" if minutes else f"{rest:.3f}".rstrip("0").rstrip(".") + "s"
