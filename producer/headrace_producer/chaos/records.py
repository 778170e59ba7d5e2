"""What chaos reads of the store: while a run goes on, and once for the audit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import asyncpg

from headrace_producer.chaos.work import Tenants
from headrace_shared.store.pool import Connection, Database
from headrace_shared.store.sql import Statements

_SQL = Statements("chaos.sql", "headrace_producer.chaos")


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
    answered_by: UUID
    """Whose call its result is: an identical job's, or its own."""
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
    rows = await database.fetch(_SQL["budgets"])
    return [(str(row["scope"]), int(row["used"]), int(row["limit"])) for row in rows]


async def holdings(database: Database, tenants: Tenants) -> list[Holding]:
    return [Holding(**row) for row in await database.fetch(_SQL["holdings"], tenants.all)]


async def held_by(database: Database, tenants: Tenants, pid: int) -> list[Holding]:
    """Return what a process of this machine holds."""
    found = await holdings(database, tenants)
    return [one for one in found if one.worker.rsplit("-", 2)[1] == str(pid)]


async def still_held(database: Database, held: Sequence[Holding]) -> int:
    row = await database.fetchrow(_SQL["still_held"], [one.job for one in held], [one.run for one in held])
    return int(row["held"]) if row else 0


async def endings(database: Database, tenants: Tenants, since: datetime) -> list[Ending]:
    return [Ending(**row) for row in await database.fetch(_SQL["endings"], tenants.all, since)]


async def progress(database: Database, tenants: Tenants) -> Progress:
    row = await database.fetchrow(_SQL["progress"], tenants.all)
    return Progress(**dict(row.items())) if row else Progress()


async def count_workers(database: Database) -> int:
    row = await database.fetchrow(_SQL["workers"])
    return int(row["workers"]) if row else 0


async def somebodys(connection: Connection, source: str) -> Mapping[str, int]:
    """Count what others have there: `workers` alive, `jobs` not ended, `configurations` not of the source.

    Nothing is there while the schema is not.
    """
    try:
        row = await connection.fetchrow(_SQL["somebodys"], source)
    except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):
        return {}
    return dict(row.items()) if row else {}


async def all_jobs(database: Connection, tenants: Tenants) -> list[JobRow]:
    return [JobRow(**row) for row in await database.fetch(_SQL["jobs"], tenants.all)]


async def all_calls(database: Connection, tenants: Tenants) -> list[CallRow]:
    return [CallRow(**row) for row in await database.fetch(_SQL["calls"], tenants.all)]


async def all_attempts(database: Connection, tenants: Tenants) -> list[AttemptRow]:
    return [AttemptRow(**row) for row in await database.fetch(_SQL["attempts"], tenants.all)]


async def all_deliveries(database: Connection, tenants: Tenants) -> list[DeliveryRow]:
    return [DeliveryRow(**row) for row in await database.fetch(_SQL["deliveries"], tenants.all)]
