"""How jobs are taken from the store and kept: claims, what they did not get, heartbeats."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum

import asyncpg

from headrace_shared.allowance import Allowance
from headrace_shared.handlers import read_endpoint
from headrace_shared.ids import BatchId, CallNumber, JobId, Lane, Run, WorkerId
from headrace_shared.job import NEEDS_EXPIRY, NEEDS_HOSTED_TOOLS, NEEDS_MAX_COST, ClaimedJob, Queue
from headrace_shared.money import NanoUSD
from headrace_shared.policy import NO_TERMS, Terms
from headrace_shared.request import Endpoint
from headrace_shared.store.jobs import queue_of
from headrace_shared.store.pool import Database, json_object
from headrace_shared.store.sql import Statements

_SQL = Statements("claims.sql")


@dataclass(frozen=True, slots=True)
class Claims:
    jobs: list[ClaimedJob]
    configuration: int | None
    """The version in force; None when nothing was claimed."""


@dataclass(frozen=True, slots=True)
class DueJob:
    id: JobId
    lane: Lane
    suspect: bool
    """Two of its runs lost their worker: it is claimed only by a process that runs nothing else."""


class Standing(StrEnum):
    """Why a claim did not get a row."""

    ENDED = "ended"
    RUNNING = "running"
    OVERDUE = "overdue"
    """Its time ran out while it was queued; nobody has written that down yet."""
    EARLY = "early"
    PAUSED = "paused"
    """An operator keeps it back, and its queue's gate was not closed yet."""
    UNKNOWN = "unknown"
    """It needs what this worker does not know."""
    SUSPECT = "suspect"
    """Two of its runs lost their worker: it is claimed only by a process that runs nothing else."""
    DUE = "due"


@dataclass(frozen=True, slots=True)
class Unclaimed:
    """A row that a claim did not get."""

    id: JobId
    queue: Queue
    standing: Standing
    due_in: timedelta


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a worker knows how to run; jobs of a newer producer may need more."""

    endpoints: tuple[str, ...] = tuple(Endpoint)
    needs: tuple[str, ...] = (NEEDS_EXPIRY, NEEDS_MAX_COST, NEEDS_HOSTED_TOOLS)


PLAIN = Abilities()


@dataclass(frozen=True, slots=True)
class Kept:
    id: JobId
    cancel_requested: bool


async def claim_jobs(
    database: Database,
    ids: Sequence[JobId],
    worker: WorkerId,
    lease: timedelta,
    *,
    abilities: Abilities = PLAIN,
    alone: bool = False,
) -> Claims:
    """Claim those of the rows that are queued, due and known; each claim raises the row's run.

    Args:
        database: where.
        ids: of the rows.
        worker: who claims.
        lease: until when it must have renewed them.
        abilities: what it can run.
        alone: whether it runs nothing else: only then it gets jobs that are suspected of crashes.

    """
    rows = await database.fetch(
        _SQL["claim_jobs"], ids, lease.total_seconds(), worker, alone, abilities.endpoints, abilities.needs
    )
    return Claims([_claimed(row, lease) for row in rows], rows[0]["configuration"] if rows else None)


def _claimed(row: asyncpg.Record, lease: timedelta) -> ClaimedJob:
    return ClaimedJob(
        id=JobId(row["id"]),
        run=Run(row["run"]),
        queue=queue_of(row),
        endpoint=read_endpoint(row["endpoint"]),
        body=row["body"],
        attempts=row["attempts"],
        max_attempts=row["max_attempts"],
        created_at=row["created_at"],
        waited=row["waited"],
        lease=lease,
        time_left=row["time_left"],
        has_webhook=row["has_webhook"],
        traceparent=row["traceparent"],
        answer=(Run(row["answer"][0]), CallNumber(row["answer"][1])) if row["answer"] else None,
        metadata=json_object(row["metadata"]),
        api_key=row["api_key"],
        tags=tuple(row["tags"]),
        batch_id=None if row["batch_id"] is None else BatchId(row["batch_id"]),
        allowance=None
        if row["max_cost_nano"] is None
        else Allowance(NanoUSD(row["max_cost_nano"]), NanoUSD(row["spent_nano"])),
        flight=row["flight"],
    )


async def pick_due(
    database: Database,
    lanes: Mapping[Lane, int],
    limit: int,
    *,
    abilities: Abilities,
    terms: Terms = NO_TERMS,
    suspects: bool = True,
) -> list[DueJob]:
    """Return jobs that are due and that a worker can run, from lanes and tenants by their weights.

    Without `suspects` those are passed over that run only in a process of their own.
    """
    tenants = sorted({*terms.weights, *terms.concurrent})
    rows = await database.fetch(
        _SQL["pick_due"],
        list(lanes),
        [float(weight) for weight in lanes.values()],
        limit,
        abilities.endpoints,
        abilities.needs,
        suspects,
        tenants,
        [float(terms.weights.get(tenant, 1)) for tenant in tenants],
        [terms.concurrent.get(tenant) for tenant in tenants],
        list(terms.keys),
        list(terms.keys.values()),
    )
    return [DueJob(JobId(row["id"]), Lane(row["lane"]), row["suspect"]) for row in rows]


async def look_up(database: Database, ids: Sequence[JobId], abilities: Abilities = PLAIN) -> list[Unclaimed]:
    """Say where rows stand; an id without a row does not come back."""
    return [
        Unclaimed(
            JobId(row["id"]),
            queue_of(row),
            Standing(row["standing"]),
            timedelta(seconds=row["due_in"] or 0),
        )
        for row in await database.fetch(_SQL["look_up"], ids, abilities.endpoints, abilities.needs)
    ]


async def is_run_by(database: Database, job_id: JobId, worker: WorkerId) -> bool:
    row = await database.fetchrow(_SQL["is_run_by"], job_id, worker)
    return row is not None and row[0] is True


async def put_off(database: Database, ids: Sequence[JobId], delay: timedelta) -> None:
    """Leave queued jobs to a worker that knows how to run them."""
    await database.execute(_SQL["put_off"], ids, delay.total_seconds())


async def heartbeat(database: Database, held: Sequence[ClaimedJob]) -> list[Kept]:
    """Renew leases; a run that does not come back was lost."""
    # Statements that lock several rows take them by id, so that no two wait for each other.
    ordered = sorted(held, key=lambda job: (job.id, job.run))
    rows = await database.fetch(
        _SQL["heartbeat"],
        [job.id for job in ordered],
        [job.run for job in ordered],
        [job.lease.total_seconds() for job in ordered],
    )
    return [Kept(JobId(row["id"]), row["cancel_requested"]) for row in rows]
