"""A job before and after it was saved, and what it leaves behind."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from uuid import UUID

from headrace_shared.allowance import Allowance
from headrace_shared.handlers import HandlerEndpoint
from headrace_shared.ids import BatchId, CallNumber, JobId, Lane, RouteName, Run, Tenant
from headrace_shared.money import NanoUSD
from headrace_shared.request import Endpoint
from headrace_shared.usage import Usage

NEEDS_EXPIRY = "expiry"
"""What a job needs of its worker when it has a time to live, a deadline or a timeout."""

NEEDS_MAX_COST = "max_cost"
"""What it needs when its calls may cost only so much together."""

NEEDS_HOSTED_TOOLS = "hosted_tools"
"""What it needs when the provider may run tools for it, which must be held for."""


class JobState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def ended(self) -> bool:
        return self not in (JobState.QUEUED, JobState.RUNNING)


@dataclass(frozen=True, slots=True)
class BatchLine:
    """Where a job stands in the file it came from."""

    batch_id: BatchId
    line: int
    """From 1, as an editor counts."""
    custom_id: str


@dataclass(frozen=True, slots=True)
class Queue:
    """The name of a queue: jobs of one lane, route, tenant and API key wait in line together."""

    lane: Lane
    route: RouteName
    tenant: Tenant
    key: str | None = None
    """The name of the API key that its jobs came with; None for those that came with none."""


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job that was checked and not yet saved."""

    id: JobId
    tenant: Tenant
    lane: Lane
    route: RouteName
    endpoint: Endpoint | HandlerEndpoint
    body: bytes
    """UTF-8 JSON: the request in the provider's own wire format, or a handler's input."""
    max_attempts: int
    delay: timedelta = timedelta(0)
    idempotency_key: str | None = None
    digest: bytes = b""
    """SHA-256 of what the job asks for: what an idempotency key is compared by."""
    webhook: str | None = None
    metadata: Mapping[str, str] | None = None
    traceparent: str | None = None
    batch_line: BatchLine | None = None
    run_at: datetime | None = None
    """When it is due; then `delay` counts nothing."""
    ttl: timedelta | None = None
    """How long it may be due before it is started."""
    deadline: datetime | None = None
    """When it must have ended."""
    timeout: timedelta | None = None
    """How long it may take from its first start, waits between its attempts included."""
    api_key: str | None = None
    """The name of the API key that it came with."""
    tags: tuple[str, ...] = ()
    """Sorted, each once."""
    max_cost: NanoUSD | None = None
    """The most that all its calls may cost together."""
    shares: bool = False
    """Whether the answer to an identical job of its tenant, made at the same time, is its own as well."""
    hosted_tools: bool = False
    """Whether the provider may run tools for it."""

    @property
    def needs(self) -> tuple[str, ...]:
        """What a worker must know beyond the endpoint."""
        expires = self.ttl or self.deadline or self.timeout
        needed = (
            (NEEDS_EXPIRY, bool(expires)),
            (NEEDS_MAX_COST, self.max_cost is not None),
            (NEEDS_HOSTED_TOOLS, self.hosted_tools),
        )
        return tuple(need for need, holds in needed if holds)

    @property
    def queue(self) -> Queue:
        return Queue(self.lane, self.route, self.tenant, self.api_key)


@dataclass(frozen=True, slots=True)
class ClaimedJob:
    """A job as its worker holds it, under a lease of its row."""

    id: JobId
    run: Run
    queue: Queue
    endpoint: Endpoint | HandlerEndpoint
    body: bytes
    attempts: int
    """Attempts that failed before this run."""
    max_attempts: int
    created_at: datetime
    waited: timedelta
    """From when it was due until it was claimed."""
    lease: timedelta
    """For how long it is held by each heartbeat."""
    time_left: timedelta | None = None
    """Until it must have ended, at its claim."""
    has_webhook: bool = False
    traceparent: str | None = None
    answer: tuple[Run, CallNumber] | None = None
    """The call of an earlier run that was answered when that run had lost the row."""
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    """Read for a handler alone."""
    api_key: str | None = None
    tags: tuple[str, ...] = ()
    batch_id: BatchId | None = None
    allowance: Allowance | None = None
    """What its calls may cost together, where that is limited."""
    flight: bytes | None = None
    """What it asks for, where an identical job's answer may be its own."""

    @property
    def tenant(self) -> Tenant:
        return self.queue.tenant


@dataclass(frozen=True, slots=True)
class Job:
    """A saved job as its row says it is."""

    id: JobId
    tenant: Tenant
    lane: Lane
    route: RouteName
    endpoint: Endpoint | HandlerEndpoint
    state: JobState
    run: Run
    attempts: int
    max_attempts: int
    crashes: int
    created_at: datetime
    run_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    waiting_for: str | None
    error_class: str | None
    error: str | None
    webhook: str | None
    batch_id: UUID | None
    custom_id: str | None
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    start_by: datetime | None = None
    """When it must have been started, until it was."""
    end_by: datetime | None = None
    """When it must have ended: its deadline, or, once it was started, the end of its timeout."""
    timeout: timedelta | None = None
    replaces: UUID | None = None
    """The job that ended badly and was retried as this one."""
    replaced_by: UUID | None = None
    """The job that this one was retried as."""
    progress: float | None = None
    """From 0 to 1, as its handler says."""
    progress_note: str | None = None
    api_key: str | None = None
    """The name of the API key that it came with."""
    tags: tuple[str, ...] = ()

    @property
    def queue(self) -> Queue:
        return Queue(self.lane, self.route, self.tenant, self.api_key)


@dataclass(frozen=True, slots=True)
class Bill:
    """What the calls of a job used and cost; suspense is not in `cost`."""

    usage: Usage
    cost: NanoUSD
    suspense: NanoUSD


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer that ended a job, byte for byte as the provider sent it."""

    run: Run
    call: CallNumber
    provider: str
    model: str
    body: bytes
    status: int
    request_id: str | None


@dataclass(frozen=True, slots=True)
class Ending:
    """A job that ended, with its answer if it has one, and its bill."""

    job: Job
    answer: Answer | None
    bill: Bill
    output: bytes | None = None
    """What its handler returned, as JSON."""
    answered_by: JobId | None = None
    """The identical job that made the call and bears its cost; None for the job itself."""
