"""How the parts behave: small values that the configuration hands out."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from types import MappingProxyType

from headrace_shared.ids import Tenant
from headrace_shared.secrets import SecretReference


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long one provider call may take.

    >>> Timeouts(connect=timedelta(seconds=5), read=timedelta(minutes=2), total=timedelta(minutes=10)).total
    datetime.timedelta(seconds=600)
    """

    connect: timedelta
    read: timedelta
    """Between two reads of the answer."""
    total: timedelta


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When a failed call is made again: full jitter between ``initial`` and ``maximum``, doubling.

    >>> RetryPolicy(
    ...     max_attempts=6,
    ...     initial=timedelta(seconds=1),
    ...     maximum=timedelta(minutes=1),
    ...     slot_wait=timedelta(seconds=2),
    ...     retry_after_cap=timedelta(minutes=2),
    ... ).max_attempts
    6
    """

    max_attempts: int
    initial: timedelta
    maximum: timedelta
    slot_wait: timedelta
    """The longest wait that keeps its slot; a longer one puts the job back."""
    retry_after_cap: timedelta
    """The longest Retry-After of a provider that is believed."""
    budget: float = 0.1
    """The share of a provider's successes that the fleet's retries may have, above 0 and up to 1."""
    floor: int = 10
    """Retries in ten seconds that are allowed however few successes there were."""


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """When a target that keeps failing is left alone.

    >>> BreakerPolicy(
    ...     failure_rate=0.5,
    ...     minimum_calls=20,
    ...     window=timedelta(seconds=30),
    ...     cooldown=timedelta(seconds=10),
    ...     probe_lease=timedelta(seconds=30),
    ... ).minimum_calls
    20
    """

    failure_rate: float
    """The share of failed calls in the window that opens the breaker, above 0 and up to 1."""
    minimum_calls: int
    window: timedelta
    cooldown: timedelta
    probe_lease: timedelta
    """How long the single probe of a half-open breaker may take before another may probe."""


@dataclass(frozen=True, slots=True)
class WebhookPolicy:
    """How callbacks are signed and repeated.

    >>> WebhookPolicy(
    ...     secret=SecretReference("env:HEADRACE_WEBHOOK_SECRET"),
    ...     previous_secret=None,
    ...     timeout=timedelta(seconds=15),
    ...     schedule=(timedelta(0), timedelta(seconds=5)),
    ... ).schedule[1]
    datetime.timedelta(seconds=5)
    """

    secret: SecretReference
    previous_secret: SecretReference | None
    """Signs as well while receivers change over."""
    timeout: timedelta
    schedule: tuple[timedelta, ...]
    """The wait before each delivery attempt, counted from the one before it."""


class SuspenseRule(StrEnum):
    """What a call came to of which nobody has learnt whether it was billed."""

    BILLED = "billed"
    """As much as it can have cost: no budget is over, whatever the bill says."""
    FREE = "free"


@dataclass(frozen=True, slots=True)
class SuspensePolicy:
    """When a call in suspense is settled without an operator, and as what."""

    after: timedelta
    rule: SuspenseRule


@dataclass(frozen=True, slots=True)
class Terms:
    """What tenants and API keys get of the workers: by default a share of one, and all free slots."""

    version: int
    """Of the configuration."""
    weights: Mapping[Tenant, int]
    concurrent: Mapping[Tenant, int]
    """How many of a tenant's jobs run at a time, at most."""
    keys: Mapping[str, int] = field(default_factory=dict[str, int])
    """How many of an API key's jobs run at a time, at most, whoever's they are."""


NO_TERMS = Terms(0, MappingProxyType({}), MappingProxyType({}))
