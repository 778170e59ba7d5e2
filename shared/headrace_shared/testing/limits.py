"""The limits per minute that a simulated provider keeps for each model, and how it reports them."""

import math
import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a model stands after a request asked for its share."""

    headers: dict[str, str]
    exceeded: str | None
    """The limit that has no room, "requests" or "tokens"; nothing was taken then."""
    wait: float
    """Seconds until there is room."""


class RateLimits:
    """A bucket of requests and a bucket of tokens for each model, refilled evenly over a minute."""

    def __init__(self, requests_per_minute: int | None, tokens_per_minute: int | None) -> None:
        self.kept = requests_per_minute is not None or tokens_per_minute is not None
        self._requests = requests_per_minute or _UNLIMITED
        self._tokens = tokens_per_minute or _UNLIMITED
        self._buckets: dict[str, tuple[_Bucket, _Bucket]] = {}
        self._open = Standing(_headers(_Bucket(self._requests), _Bucket(self._tokens)), None, 0)

    def take(self, model: str, tokens: int) -> Standing:
        """Take one request and its tokens when both fit, and say where the model stands."""
        if not self.kept:
            return self._open
        if model not in self._buckets:
            self._buckets[model] = _Bucket(self._requests), _Bucket(self._tokens)
        requests, room = self._buckets[model]
        waits = {"requests": requests.wait_for(1), "tokens": room.wait_for(min(tokens, self._tokens))}
        exceeded, wait = max(waits.items(), key=lambda item: item[1])
        if wait <= 0:
            requests.level -= 1
            room.level -= tokens
        return Standing(_headers(requests, room), exceeded if wait > 0 else None, max(0.0, wait))


_UNLIMITED = 1_000_000_000
"""What the headers say when no limit is kept."""


class _Bucket:
    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.level = float(limit)
        self._at = time.monotonic()

    def wait_for(self, amount: int) -> float:
        """Refill, and return the seconds until there is room for an amount."""
        now = time.monotonic()
        self.level = min(self.limit, self.level + (now - self._at) * self.limit / 60)
        self._at = now
        return (amount - self.level) * 60 / self.limit


def _headers(requests: _Bucket, tokens: _Bucket) -> dict[str, str]:
    headers: dict[str, str] = {}
    for name, bucket in (("requests", requests), ("tokens", tokens)):
        headers[f"x-ratelimit-limit-{name}"] = str(bucket.limit)
        headers[f"x-ratelimit-remaining-{name}"] = str(max(0, int(bucket.level)))
        headers[f"x-ratelimit-reset-{name}"] = _duration((bucket.limit - bucket.level) * 60 / bucket.limit)
    return headers


def _duration(seconds: float) -> str:
    """Return seconds as the provider writes them: 12ms, 1.5s, 6m0s."""
    if seconds < 1:
        return f"{max(0, math.ceil(seconds * 1000))}ms"
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)}m{int(rest)}s" if minutes else f"{rest:.3f}".rstrip("0").rstrip(".") + "s"
