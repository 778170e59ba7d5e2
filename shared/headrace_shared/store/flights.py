"""Identical requests in flight: who makes the call, and who waits for its answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from headrace_shared.ids import JobId, Run, Tenant
from headrace_shared.job import JobState, Queue
from headrace_shared.outcome import ErrorClass
from headrace_shared.store.jobs import queue_of
from headrace_shared.store.pool import Database
from headrace_shared.store.sql import Statements

_SQL = Statements("flights.sql")

LEADS_ON = timedelta(minutes=1)
"""A leader that is put back for longer gives its place away; the store's `leads_on` has the same."""

PROMOTING = (
    ErrorClass.RATE_LIMITED,
    ErrorClass.TRANSIENT,
    ErrorClass.TIMEOUT,
    ErrorClass.UNREADABLE,
    ErrorClass.QUOTA_EXHAUSTED,
    ErrorClass.BUDGET_EXHAUSTED,
    ErrorClass.INTERNAL,
)
"""What a leader may fail of and its followers need not."""


@dataclass(frozen=True, slots=True)
class Passenger:
    """A claimed job that may share the answer of an identical one."""

    job_id: JobId
    run: Run
    tenant: Tenant
    digest: bytes


@dataclass(frozen=True, slots=True)
class Landed:
    """A job that ended with its leader, or takes its place: queued, or running and about to wait."""

    id: JobId
    queue: Queue
    state: JobState


async def join(database: Database, passengers: Sequence[Passenger]) -> set[JobId]:
    """Take part in the flights; return those that follow another job."""
    ordered = sorted(passengers, key=lambda one: one.job_id)
    rows = await database.fetch(
        _SQL["join"],
        [one.job_id for one in ordered],
        [one.run for one in ordered],
        [one.tenant for one in ordered],
        [one.digest for one in ordered],
    )
    return {JobId(row["id"]) for row in rows}


async def land(database: Database, leaders: Sequence[JobId]) -> list[Landed]:
    """End the flights of those that lead no more, and return whose jobs changed by it."""
    rows = await database.fetch(_SQL["land"], leaders, PROMOTING)
    return [Landed(JobId(row["id"]), queue_of(row), JobState(row["state"])) for row in rows]


async def lost(database: Database, *, limit: int = 500) -> list[JobId]:
    """Return leaders that lead no more, and whose flights nobody has landed."""
    return [JobId(row["leader"]) for row in await database.fetch(_SQL["lost"], limit)]
