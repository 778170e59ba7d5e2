"""What a provider call came to: a value, whatever it was."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

from headrace_shared.outcome import Failure
from headrace_shared.usage import Usage


@dataclass(frozen=True, slots=True)
class Answered:
    """A 2xx that can be read: billed, and kept byte for byte."""

    latency: timedelta
    status: int
    request_id: str | None
    body: bytes
    usage: Usage
    finish: str
    failure: Failure | None = None
    """Why it is no success although it was billed: a content filter, a failed response."""
    limit_headers: Mapping[str, str] = field(default_factory=dict[str, str])
    """What the provider said of its limits with it, not read yet (`headrace_shared.limits.read_told`)."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A 4xx or 5xx, or a request that never left: it cost nothing."""

    latency: timedelta
    failure: Failure
    status: int | None = None
    request_id: str | None = None
    body: bytes | None = None
    limit_headers: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True)
class Unknown:
    """Sent, and nobody can know whether it was billed: a timeout, a reset, an unreadable 2xx."""

    latency: timedelta
    failure: Failure
    status: int | None = None
    request_id: str | None = None


Reply = Answered | Refused | Unknown
