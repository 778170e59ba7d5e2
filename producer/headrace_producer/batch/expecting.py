"""What requests are expected to cost, by what answers like theirs were.

A request is looked up by its template (see `headrace_shared.fingerprints`), then by its template without the
opening of its prompt, then by its model; with none of them known it counts at its worst case. The sum over
a batch is taken to be lognormal, with the mean and the variance that follow from three things: each answer
differs from the next; mean and variance are known from so many calls only; and requests that begin alike,
but have never been seen, are alike in a way that nobody knows, and are not averaged out among each other.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import NamedTuple

from headrace_shared.ids import RouteName
from headrace_shared.money import ZERO, NanoUSD
from headrace_shared.prices import TOKENS_PER_PRICE, Price
from headrace_shared.sketches import Moments, Sketch, SketchKey
from headrace_shared.usage import Usage

KNOWN_CALLS = 20
"""A template or a model with fewer answered calls is not known."""

_Z90 = NormalDist().inv_cdf(0.9)


@dataclass(frozen=True, slots=True)
class Quote:
    """The tokens and the cost of requests, each answered once.

    `most_*` cannot be exceeded by answers; half of all batches like this one cost less than `p50`, nine in
    ten less than `p90`, and `expected_*` is their mean. Calls whose answer is lost on the way come on top:
    they are listed as suspense.
    """

    requests: int = 0
    most_input_tokens: int = 0
    most_output_tokens: int = 0
    most: NanoUSD = ZERO
    expected_input_tokens: int = 0
    expected_output_tokens: int = 0
    expected: NanoUSD = ZERO
    p50: NanoUSD = ZERO
    p90: NanoUSD = ZERO
    dearest: NanoUSD = ZERO
    """The most that one of the requests can cost by itself."""
    known_by_template: int = 0
    """Requests like which enough others were answered."""
    known_by_model: int = 0
    """Others, of a model of which enough calls were answered."""

    @property
    def unknown(self) -> int:
        """Requests that count at their worst case in every figure."""
        return self.requests - self.known_by_template - self.known_by_model


class Alike(NamedTuple):
    """What requests must have in common to be counted together."""

    route: RouteName
    templates: tuple[str, ...]
    cap: int
    """The most output tokens."""
    size: int
    """The bits of the body's length: sizes differ at most by half."""


@dataclass(slots=True)
class Group:
    """Requests that are alike, added up."""

    requests: int = 0
    body_bytes: int = 0
    most_input_tokens: int = 0
    most: int = 0
    dearest: int = 0
    """The most that one of them can cost."""


@dataclass(slots=True)
class _Spread:
    """How far the cost of requests that are known by one sketch may be from its mean, in nano-USD."""

    summed: float = 0.0
    """Their standard deviations, added up: times the error of the sketch's mean."""
    independent: float = 0.0
    """The variance of requests that differ only by chance."""
    together: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Standard deviations that add up: of requests that are alike in a way, a template, that nobody knows."""
    skewness: float = 0.0
    kurtosis: float = 0.0

    def add(self, requests: int, deviation: float, moments: Moments, unknown: str | None) -> None:
        self.summed += requests * deviation
        if unknown is None:
            self.independent += requests * deviation**2
        else:
            # What is known of more than this template says nothing of its own mean.
            self.together[unknown] += requests * deviation
        self.skewness = max(self.skewness, moments.skewness)
        self.kurtosis = max(self.kurtosis, moments.kurtosis)

    def variance(self, calls: float) -> float:
        together = sum(deviation**2 for deviation in self.together.values())
        return self.independent + together + self.summed**2 / calls


class _Known:
    """A sketch, and how far the cost of the requests that it tells of may be from its mean."""

    def __init__(self, sketch: Sketch) -> None:
        self.sketch = sketch
        self.tokens_per_byte = sketch.prompt_tokens / max(sketch.body_bytes, 1)
        self.cached = min(1.0, sketch.cached_tokens / max(sketch.prompt_tokens, 1))
        """The share of a prompt that is read from a cache."""
        self.spread: _Spread | None = None
        self._moments: dict[int, tuple[Moments, float]] = {}

    def moments(self, cap: int) -> tuple[Moments, float]:
        """Return what answers are like, none of them longer than `cap`, and their standard deviation."""
        found = self._moments.get(cap)
        if found is None:
            moments = self.sketch.moments(cap)
            found = self._moments[cap] = moments, math.sqrt(moments.variance)
        return found


class Sums:
    """The cost of groups: its fixed part, and the mean and variance of what answers add to it."""

    def __init__(self, known: Mapping[SketchKey, Sketch]) -> None:
        self._known: defaultdict[tuple[str, str], dict[str, _Known]] = defaultdict(dict)
        """Of each provider and model, by template."""
        for key, sketch in known.items():
            if sketch.calls >= KNOWN_CALLS:
                self._known[key.provider, key.model][key.template] = _Known(sketch)
        self._used: list[tuple[_Spread, float]] = []
        """Where requests were found, and the calls that it is known by."""
        self._requests = self._by_template = self._by_model = 0
        self._most_read = self._most_written = self._most = self._dearest = 0
        self._read = self._written = 0.0
        self._fixed = 0
        self._mean = 0.0

    def add(self, alike: Alike, group: Group, price: Price) -> None:
        self._requests += group.requests
        self._most_read += group.most_input_tokens
        self._most_written += group.requests * alike.cap
        self._most += group.most
        self._dearest = max(self._dearest, group.dearest)
        known = self._known[price.target.provider, price.target.model]
        unknown: str | None = None
        # The closest first.
        for template in (*alike.templates, ""):
            if (found := known.get(template)) is not None:
                self._expect(alike, group, price, found, unknown)
                if template:
                    self._by_template += group.requests
                else:
                    self._by_model += group.requests
                return
            unknown = template
        self._fixed += group.most
        self._read += group.most_input_tokens
        self._written += group.requests * alike.cap

    def _expect(self, alike: Alike, group: Group, price: Price, known: _Known, unknown: str | None) -> None:
        """Add a group by a sketch; `unknown` is the last template that was looked for in vain."""
        read = self._prompt_tokens(group, price, known)
        moments, deviation = known.moments(alike.cap)
        token = _per_token(price, read)
        self._written += group.requests * moments.mean
        self._mean += group.requests * moments.mean * token
        if known.spread is None:
            known.spread = _Spread()
            self._used.append((known.spread, known.sketch.calls))
        known.spread.add(group.requests, deviation * token, moments, unknown)

    def _prompt_tokens(self, group: Group, price: Price, known: _Known) -> int:
        """Count what a group reads; return how much each of its requests does."""
        read = min(group.body_bytes * known.tokens_per_byte, group.most_input_tokens)
        each = math.ceil(read / group.requests)
        self._read += read
        self._fixed += group.requests * price.cost(Usage(each, int(each * known.cached), 0, 0))
        return each

    def quote(self) -> Quote:
        p50, p90 = _quantiles(self._mean, self._variance())
        return Quote(
            requests=self._requests,
            most_input_tokens=self._most_read,
            most_output_tokens=self._most_written,
            most=NanoUSD(self._most),
            expected_input_tokens=round(self._read),
            expected_output_tokens=round(self._written),
            expected=self._whole(self._mean),
            p50=self._whole(p50),
            p90=self._whole(p90),
            dearest=NanoUSD(self._dearest),
            known_by_template=self._by_template,
            known_by_model=self._by_model,
        )

    def _variance(self) -> float:
        parts = [(spread, spread.variance(calls), calls) for spread, calls in self._used]
        variance = sum(part for _, part, _ in parts)
        if not variance:
            return 0.0
        # Few calls that happen to be short have both too small a mean and too small a variance, so that a
        # quantile is missed more often than it says: as if it were these times nearer.
        deviation = math.sqrt(variance)
        missed = sum(
            _Z90 * spread.summed * spread.skewness * part / (deviation * calls)
            + _Z90**2 * (part / deviation) ** 2 * max(0.0, spread.kurtosis - 1) / (4 * calls)
            for spread, part, calls in parts
        )
        return variance + max(0.0, missed)

    def _whole(self, variable: float) -> NanoUSD:
        return NanoUSD(min(self._most, self._fixed + math.ceil(variable)))


def _per_token(price: Price, prompt_tokens: int) -> float:
    """Return the nano-USD of an output token behind a prompt of that length."""
    output: int | None = 0
    for step in price.steps:
        if prompt_tokens > step.above:
            output = step.output
    return (output or 0) / TOKENS_PER_PRICE


def _quantiles(mean: float, variance: float) -> tuple[float, float]:
    """Return median and ninth decile of a lognormal distribution with these moments."""
    if mean <= 0:
        return 0.0, 0.0
    deviation = math.sqrt(math.log1p(variance / (mean * mean)))
    median = mean * math.exp(-deviation * deviation / 2)
    return median, median * math.exp(_Z90 * deviation)
