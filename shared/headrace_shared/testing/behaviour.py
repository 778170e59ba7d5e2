"""How the simulated provider behaves, and which of its calls fail."""

from dataclasses import dataclass, fields
from datetime import timedelta
from enum import Enum, auto
from random import Random
from typing import ClassVar

from pydantic import ConfigDict, JsonValue, TypeAdapter, ValidationError

from headrace_shared.errors import InvalidConfiguration
from headrace_shared.testing.limits import Enforcement
from headrace_shared.validation import first_problem


class Fate(Enum):
    """What becomes of one call that is itself in order."""

    ANSWERED = auto()
    RATE_LIMITED = auto()
    SERVER_ERROR = auto()
    HUNG = auto()
    CUT = auto()
    GARBLED = auto()


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What the simulated provider does to its callers.

    Fractions are of all calls that are in order, from 0 to 1, and together at most 1. The same
    seed and the same order of requests give the same failures.
    """

    latency: timedelta = timedelta(0)
    """The mean time to an answer."""
    jitter: float = 0.0
    """The latency is spread evenly over mean * (1 - jitter) to mean * (1 + jitter)."""
    fail: float = 0.0
    """Answered 429 or 500, half each; adds to the two below."""
    rate_limited: float = 0.0
    server_error: float = 0.0
    retry_after: timedelta | None = None
    """Sent with every 429 that is not about a quota."""
    hang: float = 0.0
    """Generated, billed, and never answered: the connection stays open."""
    cut: float = 0.0
    """Generated, billed, and closed in the middle of the body."""
    garbage: float = 0.0
    """Generated, billed, and answered 200 with a body that cannot be read."""
    outage: bool = False
    """Every call is answered 503."""
    output_tokens: int = 40
    """The mean length of an answer: from half of it to one and a half, by the prompt's hash."""
    requests_per_minute: int | None = None
    """Kept for each model: what is over it is answered 429. None is no limit."""
    tokens_per_minute: int | None = None
    """Likewise; a request counts its prompt and the most that it allows as output."""
    enforcement: Enforcement = Enforcement.BUCKET
    """How both are kept."""
    seed: int = 0

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", ser_json_timedelta="float")

    def __post_init__(self) -> None:
        shares = (self.fail, self.rate_limited, self.server_error, self.hang, self.cut, self.garbage)
        if not all(0 <= share <= 1 for share in (*shares, self.jitter)) or sum(shares) > 1:
            raise _unusable("fractions are from 0 to 1, and those of the failures together at most 1")
        if self.latency < timedelta(0) or self.output_tokens < 1:
            raise _unusable("the latency is at least 0 and the output at least one token")
        if any(
            limit is not None and limit < 1 for limit in (self.requests_per_minute, self.tokens_per_minute)
        ):
            raise _unusable("a limit per minute is at least 1")


def changed(behaviour: Behaviour, changes: bytes) -> Behaviour:
    """Return a copy with the fields that a JSON object names; durations are in seconds.

    Raises InvalidConfiguration.
    """
    merged: dict[str, object] = {field.name: getattr(behaviour, field.name) for field in fields(behaviour)}
    try:
        merged.update(_CHANGES.validate_json(changes))
        return _BEHAVIOUR.validate_python(merged)
    except ValidationError as error:
        raise _unusable(first_problem(error)) from error


def as_json(behaviour: Behaviour) -> dict[str, JsonValue]:
    return _CHANGES.validate_json(_BEHAVIOUR.dump_json(behaviour))


class Fates:
    """The seeded sequence of fates and latencies: one of each is drawn for every call in order."""

    def __init__(self, behaviour: Behaviour) -> None:
        self._random = Random(behaviour.seed)  # noqa: S311 - repeatable on purpose
        self._mean = behaviour.latency.total_seconds()
        self._jitter = behaviour.jitter
        self._bounds = _bounds(behaviour)

    def draw(self) -> tuple[Fate, float]:
        """Return what happens to the next call, and its latency in seconds."""
        point, spread = self._random.random(), self._random.random()
        latency = self._mean * (1 + self._jitter * (2 * spread - 1))
        for bound, fate in self._bounds:
            if point < bound:
                return fate, latency
        return Fate.ANSWERED, latency


_CHANGES = TypeAdapter(dict[str, JsonValue])
_BEHAVIOUR = TypeAdapter(Behaviour)


def _bounds(behaviour: Behaviour) -> list[tuple[float, Fate]]:
    shares = (
        (behaviour.rate_limited + behaviour.fail / 2, Fate.RATE_LIMITED),
        (behaviour.server_error + behaviour.fail / 2, Fate.SERVER_ERROR),
        (behaviour.hang, Fate.HUNG),
        (behaviour.cut, Fate.CUT),
        (behaviour.garbage, Fate.GARBLED),
    )
    bounds: list[tuple[float, Fate]] = []
    reached = 0.0
    for share, fate in shares:
        if share:
            reached += share
            bounds.append((reached, fate))
    return bounds


def _unusable(reason: str) -> InvalidConfiguration:
    return InvalidConfiguration(where="simulated provider", reason=reason)
