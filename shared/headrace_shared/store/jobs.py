"""What producers do with jobs in the store: insert, read, cancel."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

import asyncpg

from headrace_shared.errors import IdempotencyConflict, InvalidRequest
from headrace_shared.handlers import read_endpoint
from headrace_shared.ids import CallNumber, JobId, Lane, RouteName, Run, Tenant
from headrace_shared.job import Answer, Bill, Ending, Job, JobState, NewJob, Queue
from headrace_shared.money import NanoUSD
from headrace_shared.store.pool import Database, json_object
from headrace_shared.store.sql import Statements
from headrace_shared.usage import Usage

_SQL = Statements("jobs.sql")
_LAST_ID = UUID(int=2**128 - 1)
_NOT_RECENT = "HR001"


@dataclass(frozen=True, slots=True)
class Inserted:
    """What became of one job that was handed in."""

    id: JobId
    existed: bool
    """The idempotency key was known: this is the job it belongs to."""
    due_in: timedelta = timedelta(0)
    """By the store's clock."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt at a job, and why it ended as it did."""

    run: Run
    number: int
    outcome: str
    error_class: str | None
    error: str | None
    worker: str
    ended_at: datetime
    provider: str | None = None
    """Who was called; None where nobody was. `static`: the route's own answer was given."""
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Cancellation:
    queue: Queue
    state: JobState
    changed: bool


async def insert_jobs(
    database: Database,
    jobs: Sequence[NewJob],
    *,
    configuration: int,
    keep_keys: timedelta,
    notify: bool = False,
) -> list[Inserted] | None:
    """Save jobs, all or none; return them in the order they came.

    Args:
        database: where; inside a transaction when any job has an idempotency key, because a
            conflict must undo the others.
        jobs: what to save.
        configuration: the version they were checked against.
        keep_keys: how long an idempotency key is remembered.
        notify: wake the feeder when this commits.

    Returns:
        None when another configuration is in force by now: nothing was saved.

    Raises:
        IdempotencyConflict: a key belongs to a job with another body.
        InvalidRequest: the ids are not of this time.

    """
    try:
        rows = await database.fetch(
            _SQL["insert_jobs"], *_columns(jobs), keep_keys.total_seconds(), notify, configuration
        )
    except asyncpg.PostgresError as error:
        if error.sqlstate != _NOT_RECENT:
            raise
        raise InvalidRequest(
            field="id",
            reason="was made more than 5 minutes from the database's time; set this machine's clock",
        ) from None
    if not rows:
        return None
    by_asked = {row["asked"]: row for row in rows}
    return [_inserted(job, by_asked[job.id]) for job in jobs]


def _columns(jobs: Sequence[NewJob]) -> tuple[list[object], ...]:
    rows = [
        (
            job.id,
            job.tenant,
            job.lane,
            job.route,
            job.endpoint,
            job.body,
            job.max_attempts,
            job.delay.total_seconds(),
            job.idempotency_key,
            job.digest,
            job.webhook,
            json.dumps(job.metadata) if job.metadata else None,
            job.traceparent,
            job.batch_line.batch_id if job.batch_line else None,
            job.batch_line.line if job.batch_line else None,
            job.batch_line.custom_id if job.batch_line else None,
            job.run_at,
            job.ttl.total_seconds() if job.ttl else None,
            job.deadline,
            job.timeout.total_seconds() if job.timeout else None,
            "\n".join(job.needs),
            job.api_key,
            "\n".join(job.tags),
            job.max_cost,
            job.digest if job.shares else None,
        )
        for job in jobs
    ]
    return tuple([list(column) for column in zip(*rows, strict=True)])


def _inserted(job: NewJob, row: asyncpg.Record) -> Inserted:
    if row["conflict"]:
        raise IdempotencyConflict(tenant=job.tenant, key=job.idempotency_key or "", job_id=row["id"])
    return Inserted(JobId(row["id"]), row["existed"], timedelta(seconds=row["due_in"]))


async def get_job(database: Database, job_id: JobId) -> Job | None:
    row = await database.fetchrow(_SQL["get_job"], job_id)
    return _job(row) if row else None


async def get_ending(database: Database, job_id: JobId) -> Ending | None:
    """Return a job with its bill and, when it succeeded, its answer."""
    row = await database.fetchrow(_SQL["get_ending"], job_id)
    if row is None:
        return None
    answer = None
    if row["answer_run"] is not None:
        answer = Answer(
            run=Run(row["answer_run"]),
            call=CallNumber(row["answer_call"]),
            provider=row["provider"],
            model=row["model"],
            body=row["answer"],
            status=row["status"],
            request_id=row["request_id"],
        )
    return Ending(
        _job(row),
        answer,
        Bill(usage_of(row), NanoUSD(row["cost_nano"]), NanoUSD(row["suspense_nano"])),
        row["output"],
        None if row["answered_by"] is None else JobId(row["answered_by"]),
    )


async def list_jobs(
    database: Database,
    tenant: Tenant,
    *,
    before: JobId | None = None,
    state: JobState | None = None,
    batch_id: UUID | None = None,
    limit: int = 100,
) -> list[Job]:
    """Return a page of jobs, newest first; `before` is the last id of the page before."""
    rows = await database.fetch(_SQL["list_jobs"], tenant, before or _LAST_ID, state, batch_id, limit)
    return [_job(row) for row in rows]


async def list_attempts(database: Database, job_id: JobId) -> list[Attempt]:
    return [
        Attempt(
            Run(row["run"]),
            row["number"],
            row["outcome"],
            row["error_class"],
            row["error"],
            row["worker"],
            row["ended_at"],
            row["provider"],
            row["model"],
        )
        for row in await database.fetch(_SQL["list_attempts"], job_id)
    ]


async def cancel_job(database: Database, job_id: JobId) -> Cancellation | None:
    """Cancel a job that has not ended; None when there is no such job."""
    row = await database.fetchrow(_SQL["cancel_job"], job_id)
    if row is None:
        return None
    return Cancellation(queue_of(row), JobState(row["state"]), row["changed"])


def usage_of(row: asyncpg.Record) -> Usage:
    return Usage(
        row["prompt_tokens"],
        row["cached_tokens"],
        row["completion_tokens"],
        row["reasoning_tokens"],
        row["cache_write_tokens"],
    )


def queue_of(row: asyncpg.Record) -> Queue:
    return Queue(Lane(row["lane"]), RouteName(row["route"]), Tenant(row["tenant"]), row["api_key"] or None)


def _job(row: asyncpg.Record) -> Job:
    return Job(
        id=JobId(row["id"]),
        tenant=Tenant(row["tenant"]),
        lane=Lane(row["lane"]),
        route=RouteName(row["route"]),
        endpoint=read_endpoint(row["endpoint"]),
        state=JobState(row["state"]),
        run=Run(row["run"]),
        attempts=row["attempts"],
        max_attempts=row["max_attempts"],
        crashes=row["crashes"],
        created_at=row["created_at"],
        run_at=row["run_at"],
        started_at=row["started_at"],
        ended_at=row["ended_at"],
        waiting_for=row["waiting_for"],
        error_class=row["error_class"],
        error=row["error"],
        webhook=row["webhook"],
        batch_id=row["batch_id"],
        custom_id=row["custom_id"],
        metadata=json_object(row["metadata"]),
        start_by=row["start_by"],
        end_by=row["end_by"],
        timeout=row["timeout"],
        replaces=row["replaces"],
        replaced_by=row["replaced_by"],
        progress=row["progress"],
        progress_note=row["progress_note"],
        api_key=row["api_key"],
        tags=tuple(row["tags"]),
    )
