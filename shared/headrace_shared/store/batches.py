"""Batches in the store: a file's content and its tenant, and the jobs that came of its lines."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from datetime import datetime

import asyncpg

from headrace_shared.ids import BatchId, JobId, Tenant, uuid7
from headrace_shared.job import JobState, Queue
from headrace_shared.money import NanoUSD
from headrace_shared.store.jobs import queue_of
from headrace_shared.store.pool import Database
from headrace_shared.store.sql import Statements

_SQL = Statements("batches.sql")
_RESULTS_PAGE = 100
_CANCEL_PAGE = 2000


@dataclass(frozen=True, slots=True)
class Batch:
    id: BatchId
    tenant: Tenant
    name: str
    """Of its file."""
    generation: int
    """From 1; more than one where the same content was submitted again on purpose."""
    total: int
    """Requests in the file, enqueued or not."""
    created_at: datetime


@dataclass(frozen=True, slots=True)
class OpenedBatch:
    id: BatchId
    created: bool


@dataclass(frozen=True, slots=True)
class Progress:
    """How many of a batch's jobs there are, and how they stand."""

    enqueued: int
    succeeded: int
    failed: int
    """Cancelled and expired ones too."""
    running: int
    retried: int
    """Attempts that were made again."""

    @property
    def ended(self) -> int:
        return self.succeeded + self.failed


@dataclass(frozen=True, slots=True)
class BatchCost:
    """What a batch has used and cost so far; suspense is not in `cost`."""

    prompt_tokens: int
    completion_tokens: int
    cost: NanoUSD
    suspense: NanoUSD


@dataclass(frozen=True, slots=True)
class LineResult:
    """How the job of one line ended, and what its provider said.

    The call is the one that answered a job that succeeded, and another's last one.
    """

    job_id: JobId
    line: int
    custom_id: str
    state: JobState
    error_class: str | None
    error: str | None
    status: int | None
    """Of the call: None when there was none, or nothing came back."""
    call_error_class: str | None
    request_id: str | None
    answer: bytes | None
    """Byte for byte; a refusal's too."""


@dataclass(frozen=True, slots=True)
class CancelledJob:
    id: JobId
    queue: Queue
    state: JobState
    """`cancelled`, or `running` until its worker's next heartbeat."""


async def find_batch(database: Database, tenant: Tenant, digest: bytes) -> Batch | None:
    """Return the newest batch of a content."""
    row = await database.fetchrow(_SQL["find_batch"], tenant, digest)
    return _batch(row) if row else None


async def open_batch(
    database: Database, tenant: Tenant, digest: bytes, *, name: str, total: int, again: bool = False
) -> OpenedBatch:
    """Return the newest batch of a content; a new one when there is none, or `again` asks for it."""
    row = None
    while row is None:
        row = await database.fetchrow(_SQL["open_batch"], uuid7(), tenant, digest, name, total, again)
    return OpenedBatch(BatchId(row["id"]), row["created"])


async def get_batch(database: Database, batch_id: BatchId) -> Batch | None:
    row = await database.fetchrow(_SQL["get_batch"], batch_id)
    return _batch(row) if row else None


async def batch_progress(database: Database, batch_id: BatchId) -> Progress:
    row = await database.fetchrow(_SQL["batch_progress"], batch_id)
    return Progress(**row) if row else Progress(0, 0, 0, 0, 0)


async def batch_tags(database: Database, batch_id: BatchId) -> tuple[str, ...] | None:
    """Return the tags that a batch's jobs have; None while it has no job."""
    row = await database.fetchrow(_SQL["batch_tags"], batch_id)
    return tuple(row["tags"]) if row else None


async def next_of_batch(database: Database, batch_id: BatchId) -> JobId | None:
    """Return the first job of a batch that waits, else the first that runs; None when all have ended."""
    row = await database.fetchrow(_SQL["next_of_batch"], batch_id)
    return JobId(row["id"]) if row else None


async def batch_cost(database: Database, batch_id: BatchId) -> BatchCost:
    row = await database.fetchrow(_SQL["batch_cost"], batch_id)
    if row is None:
        return BatchCost(0, 0, NanoUSD(0), NanoUSD(0))
    return BatchCost(
        row["prompt_tokens"],
        row["completion_tokens"],
        NanoUSD(row["cost_nano"]),
        NanoUSD(row["suspense_nano"]),
    )


async def batch_results(
    database: Database, batch_id: BatchId, *, after: int = 0, page: int = _RESULTS_PAGE
) -> AsyncGenerator[LineResult]:
    """Go through the jobs that have ended, in the order of the file, a page at a time."""
    while True:
        rows = await database.fetch(_SQL["batch_results"], batch_id, after, page)
        for row in rows:
            yield _line_result(row)
        if len(rows) < page:
            return
        after = rows[-1]["line"]


async def known_lines(database: Database, batch_id: BatchId, first: int, last: int) -> set[int]:
    """Return which lines of a stretch of the file have a job."""
    return {row["line"] for row in await database.fetch(_SQL["known_lines"], batch_id, first, last)}


async def cancel_batch(database: Database, batch_id: BatchId) -> AsyncGenerator[list[CancelledJob]]:
    """Cancel the jobs that have not ended, a page at a time."""
    while True:
        rows = await database.fetch(_SQL["cancel_batch"], batch_id, _CANCEL_PAGE)
        if rows:
            yield [CancelledJob(JobId(row["id"]), queue_of(row), JobState(row["state"])) for row in rows]
            continue
        left = await database.fetchrow(_SQL["uncancelled"], batch_id)
        if left is None or not left["any"]:
            return
        # What is left is locked by a worker that is writing it down: milliseconds.
        await asyncio.sleep(0.05)


def _batch(row: asyncpg.Record) -> Batch:
    return Batch(
        BatchId(row["id"]),
        Tenant(row["tenant"]),
        row["name"],
        row["generation"],
        row["total"],
        row["created_at"],
    )


def _line_result(row: asyncpg.Record) -> LineResult:
    return LineResult(
        job_id=JobId(row["id"]),
        line=row["line"],
        custom_id=row["custom_id"],
        state=JobState(row["state"]),
        error_class=row["error_class"],
        error=row["error"],
        status=row["status"],
        call_error_class=row["call_error_class"],
        request_id=row["request_id"],
        answer=row["answer"],
    )
