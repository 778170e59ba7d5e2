"""How the run of a job ends: a closed vocabulary of values.

A run ends in exactly one of `Succeeded | Retry | Snoozed | Cancelled | Failed | Expired`.
`Retry` and `Snoozed` put the job back; the other four are endings of the job. A failure
that a provider, a limit or a body caused is a value of `ErrorClass`, never an exception
that travels.
"""

from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum


class ErrorClass(StrEnum):
    """Why a call, and with it an attempt, failed."""

    RATE_LIMITED = "rate_limited"
    TRANSIENT = "transient"
    TIMEOUT = "timeout"
    BAD_REQUEST = "bad_request"
    AUTH = "auth"
    CONTEXT_TOO_LONG = "context_too_long"
    """The request does not fit into the model's context; another model may have a longer one."""
    CONTENT_FILTER = "content_filter"
    QUOTA_EXHAUSTED = "quota_exhausted"
    UNREADABLE = "unreadable"
    CANCELLED = "cancelled"
    BUDGET_EXHAUSTED = "budget_exhausted"
    UNKNOWN_PRICE = "unknown_price"
    NO_ROUTE = "no_route"
    QUARANTINED = "quarantined"
    EXPIRED = "expired"
    HANDLER = "handler"
    """The application's own code raised, or returned what cannot be kept."""
    INTERNAL = "internal"


class WaitReason(StrEnum):
    """What a job that was put back waits for."""

    RETRY = "retry"
    BREAKER = "breaker"
    BUDGET = "budget"
    LIMIT = "limit"
    PAUSE = "pause"
    SERVERS = "servers"
    """PostgreSQL or Redis was away."""
    EPOCH = "epoch"
    """The intent of its call was refused: the counters of budgets are new, or its row is."""
    SHUTDOWN = "shutdown"
    LOST_LEASE = "lost_lease"
    WORKER = "worker"
    """No worker that saw it knows its endpoint, its handler, or something else that it needs."""
    FLIGHT = "flight"
    """An identical job is making the call; its answer is this one's as well."""


@dataclass(frozen=True, slots=True)
class Failure:
    """One failed call: its class, a sentence, and what the provider asked for."""

    error_class: ErrorClass
    message: str
    retry_after: timedelta | None = None


@dataclass(frozen=True, slots=True)
class Succeeded:
    """The run's last call was answered, and its answer is the job's result."""


@dataclass(frozen=True, slots=True)
class Retry:
    """The attempt failed; another one is due in `delay`."""

    delay: timedelta
    failure: Failure


@dataclass(frozen=True, slots=True)
class Snoozed:
    """Nothing failed; the job must wait for `reason` and costs no attempt."""

    delay: timedelta
    reason: WaitReason


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Somebody asked for it."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The attempt failed and there will be no other."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class Expired:
    """Its time ran out before it could end."""

    message: str


Outcome = Succeeded | Retry | Snoozed | Cancelled | Failed | Expired
