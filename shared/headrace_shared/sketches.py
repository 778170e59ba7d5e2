"""What answered calls used, added up: how many tokens they read for each byte, and how long answers were.

Lengths are counted in buckets that grow with the number, 32 to each doubling: a length is known to about
1.5 %, a sum of many far better, and a sketch of a million answers is a few hundred numbers.
"""

from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import NamedTuple

from headrace_shared.usage import Usage

_FINE = 32
"""Buckets to each doubling; lengths up to twice that have a bucket each."""
_FINE_BITS = _FINE.bit_length() - 1

_ROUNDING = 1e-9


class SketchKey(NamedTuple):
    """A template's answers by one model; with the template '' all of the model's."""

    provider: str
    model: str
    template: str = ""


@dataclass(frozen=True, slots=True)
class Moments:
    """What lengths are like."""

    mean: float
    variance: float
    skewness: float
    kurtosis: float
    """3 for a normal distribution."""


@dataclass(frozen=True, slots=True)
class Sketch:
    """Sums over answered calls; they fade, and so need not be whole."""

    calls: float
    prompt_tokens: float
    cached_tokens: float
    body_bytes: float
    lengths: tuple[float, ...]
    """How many answers had a length of each bucket."""

    def moments(self, cap: int) -> Moments:
        """Return the moments of the lengths, none of them longer than `cap`."""
        total = first = second = third = fourth = 0.0
        for length, count in zip(_middles(len(self.lengths), cap), self.lengths, strict=True):
            if count:
                total += count
                first += (power := count * length)
                second += (power := power * length)
                third += (power := power * length)
                fourth += power * length
        if not total:
            return Moments(float(cap), 0.0, 0.0, 0.0)
        mean, second, third, fourth = first / total, second / total, third / total, fourth / total
        central = second - mean**2
        # Of one length that comes again and again nothing is left but the error of the subtraction.
        if central <= _ROUNDING * second:
            return Moments(mean, 0.0, 0.0, 0.0)
        skewed = third - 3 * mean * second + 2 * mean**3
        peaked = fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4
        variance = central * total / max(total - 1, 1)
        return Moments(mean, variance, skewed / central**1.5, peaked / central**2)


@dataclass(slots=True)
class Collected:
    """A sketch that is being made."""

    calls: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    body_bytes: int = 0
    lengths: dict[int, int] = field(default_factory=dict[int, int])
    """Counts by bucket."""

    def add(self, usage: Usage, body_bytes: int) -> None:
        self.calls += 1
        self.prompt_tokens += usage.prompt_tokens
        self.cached_tokens += usage.cached_tokens
        self.body_bytes += body_bytes
        bucket = bucket_of(usage.completion_tokens)
        self.lengths[bucket] = self.lengths.get(bucket, 0) + 1

    def sketch(self) -> Sketch:
        counts = tuple(self.lengths.get(bucket, 0) for bucket in range(max(self.lengths, default=-1) + 1))
        return Sketch(self.calls, self.prompt_tokens, self.cached_tokens, self.body_bytes, counts)


def bucket_of(tokens: int) -> int:
    """Return the bucket of a length.

    >>> [bucket_of(tokens) for tokens in (0, 63, 64, 65, 66, 128)]
    [0, 63, 64, 64, 65, 96]
    """
    coarse = max(0, tokens.bit_length() - 1 - _FINE_BITS)
    return coarse * _FINE + (tokens >> coarse)


@lru_cache(maxsize=256)
def _middles(buckets: int, cap: int) -> tuple[float, ...]:
    """Return the lengths that stand for the first buckets, none of them longer than `cap`."""
    return tuple(min(middle_of(bucket), cap) for bucket in range(buckets))


@cache
def middle_of(bucket: int) -> float:
    """Return the length that stands for a bucket."""
    if bucket < 2 * _FINE:
        return float(bucket)
    coarse = bucket // _FINE - 1
    lowest = (bucket - coarse * _FINE) << coarse
    return lowest + ((1 << coarse) - 1) / 2
