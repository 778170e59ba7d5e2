"""What the feeder, and whoever does the house's chores, asks of the store."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from headrace_shared.dispatch.dispatch import Entry
from headrace_shared.ids import JobId, Lane, WorkerId
from headrace_shared.job import Queue
from headrace_shared.store.jobs import queue_of
from headrace_shared.store.pool import Database
from headrace_shared.store.sql import Statements

_SQL = Statements("feed.sql")


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    id: WorkerId
    host: str
    slots: int
    lanes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Depth:
    """What is due in a lane."""

    lane: Lane
    jobs: int
    oldest: timedelta
    """How long the oldest job has been due."""


async def depths(database: Database) -> list[Depth]:
    """Count what is due; reads the whole backlog, so not for every second."""
    return [
        Depth(Lane(row["lane"]), row["jobs"], timedelta(seconds=row["oldest"]))
        for row in await database.fetch(_SQL["depths"])
    ]


async def due_queues(database: Database) -> list[Queue]:
    """Return the queues that have a job due."""
    return [queue_of(row) for row in await database.fetch(_SQL["due_queues"])]


async def due_jobs(database: Database, queues: Sequence[Queue], *, limit: int) -> list[list[JobId]]:
    """Return the head of each queue, of so many jobs at most, in the order they are due."""
    parts = (
        [queue.lane for queue in queues],
        [queue.route for queue in queues],
        [queue.tenant for queue in queues],
        [queue.key or "" for queue in queues],
    )
    heads = [list[JobId]() for _ in queues]
    for row in await database.fetch(_SQL["due_jobs"], *parts, limit):
        place: int = row["place"]
        heads[place].append(JobId(row["id"]))
    return heads


async def has_jobs(database: Database) -> bool:
    """Whether the store has any job, ended ones among them."""
    return await database.fetchrow(_SQL["has_jobs"]) is not None


async def running_jobs(database: Database) -> list[tuple[Entry, timedelta]]:
    """Return the jobs that run, and for how long their leases hold."""
    return [
        (Entry(queue_of(row), JobId(row["id"])), timedelta(seconds=row["lease"]))
        for row in await database.fetch(_SQL["running_jobs"])
    ]


async def lead(database: Database, role: str, holder: WorkerId, lease: timedelta) -> bool:
    """Take or keep a role; false when somebody else has it."""
    return await database.fetchrow(_SQL["lead"], role, holder, lease.total_seconds()) is not None


async def resign(database: Database, role: str, holder: WorkerId) -> None:
    await database.execute(_SQL["resign"], role, holder)


async def register_worker(
    database: Database, worker: WorkerId, *, host: str, slots: int, lanes: Sequence[str], alive: timedelta
) -> int:
    """Say that a worker is there, and for how long to believe it; return the configuration in force."""
    row = await database.fetchrow(_SQL["register_worker"], worker, host, slots, lanes, alive.total_seconds())
    return int(row["configuration"]) if row else 0


async def reach_dispatch(database: Database, worker: WorkerId, believed: timedelta) -> bool:
    """Say that a worker reaches Redis, for so long at least; true when an epoch without it is to end."""
    row = await database.fetchrow(_SQL["reach_dispatch"], worker, believed.total_seconds())
    return row is None or bool(row[0])


async def forget_worker(database: Database, worker: WorkerId) -> None:
    await database.execute(_SQL["forget_worker"], worker)


async def live_workers(database: Database) -> list[WorkerInfo]:
    return [
        WorkerInfo(WorkerId(row["id"]), row["host"], row["slots"], tuple(row["lanes"]))
        for row in await database.fetch(_SQL["live_workers"])
    ]


async def make_partitions(database: Database) -> None:
    """Make the partitions of this week and the four that follow."""
    await database.execute(_SQL["make_partitions"])


async def drop_partitions(database: Database, *, older_than: timedelta) -> list[str]:
    """Drop the weeks that ended before then and hold nothing that is still under way."""
    rows = await database.fetch(_SQL["drop_partitions"], older_than.days)
    return [row[0] for row in rows]


async def forget_expired(database: Database, *, older_than: timedelta) -> int:
    """Delete expired idempotency keys, old callbacks and dead workers; return how many."""
    row = await database.fetchrow(_SQL["forget_expired"], older_than.days)
    return int(row[0]) if row else 0
