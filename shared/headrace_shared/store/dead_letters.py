"""Jobs that ended without a result, as the store has them, and the jobs that take their places."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

from headrace_shared.ids import BatchId, JobId, RouteName, Tenant, new_job_id
from headrace_shared.job import NEEDS_EXPIRY, JobState, Queue
from headrace_shared.store.jobs import queue_of
from headrace_shared.store.pool import Database
from headrace_shared.store.sql import Statements

PAGE = 500
"""Jobs that are retried in one transaction."""

_SQL = Statements("dead_letters.sql")
_ALWAYS = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST_ID = UUID(int=0)


@dataclass(frozen=True, slots=True)
class Selection:
    """Which dead letters are meant: those that meet all that is given."""

    tenant: Tenant | None = None
    batches: tuple[BatchId, ...] = ()
    """Any of these; when there are none, all jobs are meant."""
    error_class: str | None = None
    fingerprint: str | None = None
    since: timedelta | None = None
    """Only those that ended in this time."""

    @property
    def is_empty(self) -> bool:
        return self == Selection()


@dataclass(frozen=True, slots=True)
class FailureGroup:
    """Failures of one kind: they differ at most in numbers, ids and quoted words."""

    fingerprint: str
    error_class: str
    count: int
    first: datetime
    last: datetime
    job_id: JobId
    """The newest of them."""
    example: str
    """Its error."""


@dataclass(frozen=True, slots=True)
class NamedJob:
    """A job as somebody who wants to retry it must know it."""

    id: JobId
    state: JobState
    replaced_by: UUID | None


@dataclass(frozen=True, slots=True)
class Named:
    """What ids turned out to be."""

    jobs: Sequence[NamedJob]
    batches: Sequence[BatchId]


@dataclass(frozen=True, slots=True)
class NewBody:
    """Another request for a job that is retried, checked under a version of the configuration."""

    body: bytes
    digest: bytes
    route: RouteName
    configuration: int
    needs: tuple[str, ...] = ()
    """What it needs of a worker."""


@dataclass(frozen=True, slots=True)
class Retried:
    """A job in the place of an older one."""

    old: JobId
    new: JobId
    queue: Queue


async def store_time(database: Database) -> datetime:
    """Return what time the store has."""
    row = await database.fetchrow(_SQL["store_time"])
    return row["now"] if row else _ALWAYS


async def failure_groups(database: Database, selection: Selection, until: datetime) -> list[FailureGroup]:
    """Return the failures that ended up to a moment and were not retried, the most frequent kind first."""
    return [
        FailureGroup(
            row["fingerprint"],
            row["error_class"],
            row["count"],
            row["first"],
            row["last"],
            JobId(row["job_id"]),
            row["example"],
        )
        for row in await database.fetch(_SQL["failure_groups"], *_conditions(selection, until))
    ]


async def dead_letters(
    database: Database, selection: Selection, until: datetime, *, page: int = PAGE
) -> AsyncGenerator[list[JobId]]:
    """Go through the failures that ended up to a moment and were not retried, a page at a time."""
    begin, *conditions = _conditions(selection, until)
    last: tuple[object, UUID] = begin, _FIRST_ID
    while True:
        rows = await database.fetch(_SQL["dead_page"], last[0], *conditions, last[1], page)
        if rows:
            yield [JobId(row["id"]) for row in rows]
        if len(rows) < page:
            return
        last = rows[-1]["ended_at"], rows[-1]["id"]


def _conditions(selection: Selection, until: datetime) -> list[object]:
    return [
        _ALWAYS if selection.since is None else until - selection.since,
        until,
        selection.tenant,
        list(selection.batches) or None,
        selection.error_class,
        selection.fingerprint,
    ]


async def look_up_named(database: Database, ids: Sequence[UUID]) -> Named:
    """Say what ids are of; one that is of no job and no batch is in neither list."""
    rows = await database.fetch(_SQL["named"], ids)
    jobs = [
        NamedJob(JobId(row["id"]), JobState(row["state"]), row["replaced_by"])
        for row in rows
        if row["total"] is None
    ]
    return Named(jobs, [BatchId(row["id"]) for row in rows if row["total"] is not None])


async def retry_jobs(
    database: Database,
    ids: Sequence[JobId],
    *,
    new_body: NewBody | None = None,
    deadline: datetime | None = None,
) -> list[Retried]:
    """Put new jobs in the places of ended ones, in one transaction.

    A new job is what the old one was when it was new. What a handler had checkpointed is not
    taken over: whoever retries it wants it done again.

    Args:
        database: where.
        ids: of the old ones.
        new_body: what it asks for instead; then there is one id.
        deadline: of the new ones, instead of the old one's if that has not passed.

    Returns:
        Those that were retried. The others have not ended, have a result, or were retried
        before; or the configuration is another than the one `new_body` was checked against.

    """
    change: tuple[object, ...] = (None, None, None, None)
    if new_body is not None:
        change = new_body.body, new_body.route, new_body.digest, new_body.configuration
    fresh = [new_job_id() for _ in ids]
    needs = (*(() if new_body is None else new_body.needs), *((NEEDS_EXPIRY,) if deadline else ()))
    rows = await database.fetch(_SQL["retry_jobs"], ids, fresh, *change, deadline, needs)
    return [Retried(JobId(row["replaces"]), JobId(row["id"]), queue_of(row)) for row in rows]
