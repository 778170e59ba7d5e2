"""What the store knows of one job that waits, or runs: for whoever asks why."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from headrace_shared.ids import JobId, Lane, WorkerId
from headrace_shared.job import Job
from headrace_shared.money import NanoUSD
from headrace_shared.routes import Target
from headrace_shared.store.money import WindowKind
from headrace_shared.store.pool import Database
from headrace_shared.store.sql import Statements

_SQL = Statements("waits.sql")

MOST_COUNTED = 100_000
"""Jobs before another that are counted; of more it is only said that they are more."""

_TOO_FEW = 3
"""Endings that say nothing yet about how fast a queue is served."""


@dataclass(frozen=True, slots=True)
class OpenCall:
    """A call that is out."""

    target: Target
    since: datetime
    held: NanoUSD


@dataclass(frozen=True, slots=True)
class RunOf:
    """Who has a job now, if anybody has."""

    now: datetime
    worker: WorkerId | None
    lease_until: datetime | None
    cancel_requested: bool
    call: OpenCall | None


@dataclass(frozen=True, slots=True)
class Capacity:
    """What there is to run the jobs of a lane."""

    workers: int
    """Alive, whatever lanes they serve."""
    serving: int
    """Those of them that serve the lane."""
    slots: int
    running: int


def _queue_of(job: Job) -> tuple[str, str, str, str]:
    return job.lane, job.route, job.tenant, job.api_key or ""


async def run_of(database: Database, job_id: JobId) -> RunOf | None:
    row = await database.fetchrow(_SQL["run_of"], job_id)
    if row is None:
        return None
    call = None
    if row["provider"] is not None:
        call = OpenCall(Target(row["provider"], row["model"]), row["opened_at"], NanoUSD(row["held_nano"]))
    worker = None if row["worker"] is None else WorkerId(row["worker"])
    return RunOf(row["now"], worker, row["lease_until"], row["cancel_requested"], call)


async def body_of(database: Database, job_id: JobId) -> bytes | None:
    row = await database.fetchrow(_SQL["body_of"], job_id)
    return None if row is None else bytes(row["body"])


async def place_of(database: Database, job: Job) -> int:
    """Return how many jobs of its queue are before a job; `MOST_COUNTED` + 1 when there are more."""
    row = await database.fetchrow(_SQL["place_of"], *_queue_of(job), job.run_at, job.id, MOST_COUNTED + 1)
    return int(row[0]) if row else 0


async def capacity_for(database: Database, lane: Lane) -> Capacity:
    [row] = await database.fetch(_SQL["capacity_for"], lane)
    return Capacity(row["workers"], row["serving"], row["slots"], row["running"])


async def pace_of(database: Database, job: Job) -> float | None:
    """Return how many jobs of its queue end in a second, of late; None when too few have."""
    row = await database.fetchrow(_SQL["pace_of"], *_queue_of(job))
    if row is None or row["ended"] < _TOO_FEW or not row["seconds"] or row["seconds"] <= 0:
        return None
    ended: int = row["ended"]
    return ended / float(row["seconds"])


async def window_ends_in(database: Database, kind: WindowKind) -> timedelta | None:
    """Return when the present window of a kind turns; None for one that never does."""
    row = await database.fetchrow(_SQL["window_ends_in"], kind)
    return None if row is None or row["seconds"] is None else timedelta(seconds=row["seconds"])
