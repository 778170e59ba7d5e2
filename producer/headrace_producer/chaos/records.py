"""What chaos reads of the store: while a run goes on, and once for the audit."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from headrace_producer.chaos.work import Tenants
from headrace_shared.store.pool import Connection, Database

_BUDGETS = """
SELECT b.scope, b.limit_nano AS limit,
       (SELECT coalesce(sum(s.settled_nano + s.suspense_nano), 0) FROM headrace.spend s
        WHERE s.scope = b.scope AND s.window_name = 'total')
     + (SELECT coalesce(sum(c.held_nano), 0) FROM headrace.calls c
        WHERE c.state = 'open' AND b.scope = ANY(c.scopes)) AS used
FROM headrace.budgets b WHERE b.window_kind = 'total'
"""

_HOLDINGS = """
SELECT id AS job, run, worker, headrace.now() AS at FROM headrace.jobs
WHERE state = 'running' AND tenant = ANY($1::text[])
"""

_STILL_HELD = """
SELECT count(*) AS held FROM headrace.jobs j JOIN unnest($1::uuid[], $2::int[]) AS held(id, run) USING (id)
WHERE j.run = held.run AND j.state = 'running'
"""

_ENDINGS = """
SELECT j.id AS job, j.state, j.run, j.result_run, j.result_call, j.ended_at, md5(c.answer) AS answer
FROM headrace.jobs j
LEFT JOIN headrace.calls c ON c.job_id = j.id AND c.run = j.result_run AND c.call = j.result_call
WHERE j.tenant = ANY($1::text[]) AND j.ended_at > $2
"""

_PROGRESS = """
SELECT count(*) AS jobs, count(*) FILTER (WHERE ended_at IS NOT NULL) AS ended,
       count(*) FILTER (WHERE state = 'succeeded') AS succeeded,
       count(*) FILTER (WHERE state = 'failed') AS failed,
       count(*) FILTER (WHERE state = 'cancelled') AS cancelled,
       count(*) FILTER (WHERE state = 'running') AS running,
       (SELECT count(*) FROM headrace.deliveries
        WHERE state = 'pending' AND tenant = ANY($1::text[])) AS undelivered,
       (SELECT count(*) FROM headrace.calls WHERE state = 'open' AND tenant = ANY($1::text[])) AS open_calls
FROM headrace.jobs WHERE tenant = ANY($1::text[])
"""

_JOBS = """
SELECT j.id, i.key, j.tenant, j.state, j.run, j.attempts, j.crashes, j.result_run, j.result_call,
       j.webhook IS NOT NULL AS has_webhook, j.ended_at, j.waiting_for, j.error_class
FROM headrace.jobs j LEFT JOIN headrace.idempotency i ON i.job_id = j.id
WHERE j.tenant = ANY($1::text[])
"""

_CALLS = """
SELECT job_id AS job, run, call, state, error_class, request_id, cost_nano AS cost,
       suspense_nano AS suspense, opened_at, ended_at
FROM headrace.calls WHERE tenant = ANY($1::text[])
"""

_ATTEMPTS = """
SELECT a.job_id AS job, a.run, a.worker FROM headrace.attempts a JOIN headrace.jobs j ON j.id = a.job_id
WHERE j.tenant = ANY($1::text[])
"""

_DELIVERIES = """
SELECT id, job_id AS job, state FROM headrace.deliveries WHERE tenant = ANY($1::text[])
"""


@dataclass(frozen=True, slots=True)
class Holding:
    """A job that is in a worker's hands."""

    job: UUID
    run: int
    worker: str
    at: datetime
    """When this was seen, by the store's clock."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a job ended."""

    job: UUID
    state: str
    run: int
    result_run: int | None
    result_call: int | None
    ended_at: datetime
    answer: str | None
    """The answer's MD5."""

    @property
    def in_words(self) -> str:
        return f"{self.state} in run {self.run} with {self.answer or 'no answer'}"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far all jobs are."""

    jobs: int = 0
    ended: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    running: int = 0
    undelivered: int = 0
    open_calls: int = 0

    @property
    def is_drained(self) -> bool:
        return self.ended == self.jobs and not self.undelivered and not self.open_calls

    @property
    def in_words(self) -> str:
        return (
            f"{self.ended:,} of {self.jobs:,} jobs ended: {self.succeeded:,} succeeded, "
            f"{self.failed:,} failed, {self.cancelled:,} cancelled; {self.running} running, "
            f"{self.undelivered} callbacks to deliver, {self.open_calls} calls open"
        )


@dataclass(frozen=True, slots=True)
class JobRow:
    id: UUID
    key: str | None
    tenant: str
    state: str
    run: int
    attempts: int
    crashes: int
    result_run: int | None
    result_call: int | None
    has_webhook: bool
    ended_at: datetime | None
    waiting_for: str | None = None
    error_class: str | None = None


@dataclass(frozen=True, slots=True)
class CallRow:
    job: UUID
    run: int
    call: int
    state: str
    error_class: str | None
    request_id: str | None
    cost: int
    suspense: int
    opened_at: datetime
    ended_at: datetime | None


@dataclass(frozen=True, slots=True)
class AttemptRow:
    job: UUID
    run: int
    worker: str


@dataclass(frozen=True, slots=True)
class DeliveryRow:
    id: UUID
    job: UUID
    state: str


async def budgets(database: Database) -> list[tuple[str, int, int]]:
    """Return of each budget its scope, what is used or held of it, and its limit: all of one moment."""
    rows = await database.fetch(_BUDGETS)
    return [(str(row["scope"]), int(row["used"]), int(row["limit"])) for row in rows]


async def holdings(database: Database, tenants: Tenants) -> list[Holding]:
    return [Holding(**row) for row in await database.fetch(_HOLDINGS, tenants.all)]


async def held_by(database: Database, tenants: Tenants, pid: int) -> list[Holding]:
    """Return what a process of this machine holds."""
    found = await holdings(database, tenants)
    return [one for one in found if one.worker.rsplit("-", 2)[1] == str(pid)]


async def still_held(database: Database, held: Sequence[Holding]) -> int:
    row = await database.fetchrow(_STILL_HELD, [one.job for one in held], [one.run for one in held])
    return int(row["held"]) if row else 0


async def endings(database: Database, tenants: Tenants, since: datetime) -> list[Ending]:
    return [Ending(**row) for row in await database.fetch(_ENDINGS, tenants.all, since)]


async def progress(database: Database, tenants: Tenants) -> Progress:
    row = await database.fetchrow(_PROGRESS, tenants.all)
    return Progress(**dict(row.items())) if row else Progress()


async def all_jobs(database: Connection, tenants: Tenants) -> list[JobRow]:
    return [JobRow(**row) for row in await database.fetch(_JOBS, tenants.all)]


async def all_calls(database: Connection, tenants: Tenants) -> list[CallRow]:
    return [CallRow(**row) for row in await database.fetch(_CALLS, tenants.all)]


async def all_attempts(database: Connection, tenants: Tenants) -> list[AttemptRow]:
    return [AttemptRow(**row) for row in await database.fetch(_ATTEMPTS, tenants.all)]


async def all_deliveries(database: Connection, tenants: Tenants) -> list[DeliveryRow]:
    return [DeliveryRow(**row) for row in await database.fetch(_DELIVERIES, tenants.all)]
