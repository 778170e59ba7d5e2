"""Where a model's requests go."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import assert_never

from headrace_shared.ids import RouteName
from headrace_shared.outcome import ErrorClass
from headrace_shared.policy import Timeouts
from headrace_shared.secrets import SecretReference


@dataclass(frozen=True, slots=True)
class Target:
    """One model of one provider: what is priced, limited and guarded.

    >>> str(Target("openai", "gpt-4o-mini"))
    'openai/gpt-4o-mini'
    """

    provider: str
    model: str

    def __str__(self) -> str:
        return f"{self.provider}/{self.model}"

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Read ``provider/model``; the model may contain further slashes.

        Raises:
            ValueError: one of the two is missing.

        """
        provider, _, model = text.partition("/")
        if not provider or not model:
            raise ValueError("must be named provider/model")
        return cls(provider, model)


STATIC_PROVIDER = "static"
"""Stands in the ledger where a route's own answer was given: nobody was called."""


class Strategy(StrEnum):
    """By what one of several targets is chosen for a call."""

    WEIGHTED = "weighted"
    LEAST_LOADED = "least-loaded"
    LATENCY_AWARE = "latency-aware"
    LOWEST_COST = "lowest-cost"


class Trouble(StrEnum):
    """What a call met that another target may not meet: the error classes, as a route sees them."""

    RATE_LIMITED = "rate_limited"
    """The target's limit or quota is used up."""
    DOWN = "down"
    """It did not answer, or not credibly, or refuses the key."""
    CONTEXT_TOO_LONG = "context_too_long"
    CONTENT_FILTER = "content_filter"

    @property
    def is_of_the_request(self) -> bool:
        """Whether the same model would say the same again, whoever serves it."""
        return self in (Trouble.CONTEXT_TOO_LONG, Trouble.CONTENT_FILTER)


def trouble_of(error_class: ErrorClass) -> Trouble | None:
    """Return what a failed call means for the choice of the next target; None: no other would do better."""
    match error_class:
        case ErrorClass.RATE_LIMITED | ErrorClass.QUOTA_EXHAUSTED:
            return Trouble.RATE_LIMITED
        case ErrorClass.TRANSIENT | ErrorClass.TIMEOUT | ErrorClass.UNREADABLE | ErrorClass.AUTH:
            return Trouble.DOWN
        case ErrorClass.CONTEXT_TOO_LONG:
            return Trouble.CONTEXT_TOO_LONG
        case ErrorClass.CONTENT_FILTER:
            return Trouble.CONTENT_FILTER
        case (
            ErrorClass.BAD_REQUEST
            | ErrorClass.CANCELLED
            | ErrorClass.BUDGET_EXHAUSTED
            | ErrorClass.UNKNOWN_PRICE
            | ErrorClass.NO_ROUTE
            | ErrorClass.QUARANTINED
            | ErrorClass.EXPIRED
            | ErrorClass.HANDLER
            | ErrorClass.INTERNAL
        ):
            return None
        case _:
            assert_never(error_class)


@dataclass(frozen=True, slots=True)
class Fallback:
    """A target that is called only where the others met one of these troubles."""

    on: frozenset[Trouble]
    target: Target


@dataclass(frozen=True, slots=True)
class Route:
    """The targets that may answer for a public model name."""

    name: RouteName
    targets: tuple[Target, ...]
    """At least one: several keys or deployments of one model."""
    weights: tuple[int, ...]
    """The share of each target, in the same order."""
    strategy: Strategy = Strategy.WEIGHTED
    fallbacks: tuple[Fallback, ...] = ()
    """In the order in which they are tried."""
    answer: str | None = None
    """The text that is given, marked as such, where no target has given one."""
    timeouts: Mapping[Target, Timeouts] = field(default_factory=dict[Target, Timeouts], hash=False)
    """Of the targets that do not go by their provider's own."""

    @property
    def all_targets(self) -> tuple[Target, ...]:
        """Everybody who may be called, the fallbacks last; each once."""
        return tuple(dict.fromkeys([*self.targets, *(each.target for each in self.fallbacks)]))

    def fallbacks_on(self, troubles: Collection[Trouble]) -> tuple[Target, ...]:
        """Return the fallbacks for any of these troubles."""
        return tuple(each.target for each in self.fallbacks if not each.on.isdisjoint(troubles))

    def needs(self, target: Target) -> bool:
        """Whether nobody else answers while this target is down."""
        return {*self.targets, *self.fallbacks_on({Trouble.DOWN})} == {target}


@dataclass(frozen=True, slots=True)
class Provider:
    """How to reach a provider; its base URL has no slash at the end, and may have a query."""

    name: str
    base_url: str
    api_key: SecretReference
    priced_as: str
    """The provider's id in the price data."""
    timeouts: Timeouts
    key_header: str | None = None
    """The header that carries the bare key; None: `Authorization`, as a bearer token."""
    headers: Mapping[str, str] = field(default_factory=dict[str, str], hash=False)
    """Literal values, or ``env:NAME`` and ``file:PATH`` references."""

    def resolve_headers(self) -> dict[str, str]:
        """Return the headers to send, with the references read.

        Raises:
            MissingSetting: a referenced variable or file is missing.

        """
        return {name: _resolve(value) for name, value in self.headers.items()}


def _resolve(value: str) -> str:
    is_reference = value.startswith(("env:", "file:"))
    return SecretReference(value).resolve().reveal() if is_reference else value
