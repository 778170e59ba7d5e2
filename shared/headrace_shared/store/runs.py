"""What workers do with jobs in the store: claim, keep, journal, finish.

Every write names the run it was given; a row that has moved on is not changed by it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import asyncpg

from headrace_shared.ids import CallNumber, HoldId, JobId, Run, WorkerId
from headrace_shared.job import ClaimedJob, JobState, Queue
from headrace_shared.money import ZERO, NanoUSD
from headrace_shared.outcome import (
    Cancelled,
    ErrorClass,
    Expired,
    Failed,
    Outcome,
    Retry,
    Snoozed,
    Succeeded,
    WaitReason,
)
from headrace_shared.request import Endpoint
from headrace_shared.store.jobs import queue_of
from headrace_shared.store.pool import Database
from headrace_shared.store.sql import Statements
from headrace_shared.usage import NO_USAGE, Usage

_SQL = Statements("runs.sql")


@dataclass(frozen=True, slots=True)
class Claims:
    jobs: list[ClaimedJob]
    configuration: int | None
    """The version in force; None when nothing was claimed."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a row stands that a claim did not get."""

    id: JobId
    state: JobState
    due_in: timedelta


@dataclass(frozen=True, slots=True)
class Kept:
    id: JobId
    cancel_requested: bool


@dataclass(frozen=True, slots=True)
class Intent:
    """A call that is about to be sent, and the hold that pays for it."""

    job_id: JobId
    run: Run
    call: CallNumber
    provider: str
    model: str
    hold_id: HoldId
    held: NanoUSD
    held_at: datetime
    scopes: tuple[str, ...]
    price_version: str


@dataclass(frozen=True, slots=True)
class Conclusion:
    """What became of a call. A call that was never sent is `failed` and cost nothing."""

    job_id: JobId
    run: Run
    call: CallNumber
    state: str
    """`answered`, `failed`, or `suspense`."""
    latency: timedelta
    status: int | None = None
    error_class: ErrorClass | None = None
    request_id: str | None = None
    usage: Usage = NO_USAGE
    cost: NanoUSD = ZERO
    suspense: NanoUSD = ZERO
    answer: bytes | None = None


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    job_id: JobId
    run: Run
    number: int
    call: CallNumber | None
    outcome: str
    """`succeeded`, `retried`, or `failed`."""
    error_class: ErrorClass | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class RunEnd:
    """How a run ended, and what the job's row becomes by it."""

    job_id: JobId
    run: Run
    outcome: Outcome
    attempts: int
    """Attempts that have failed by now."""
    result: tuple[Run, CallNumber] | None = None
    """The call whose answer the job succeeded with."""


@dataclass(frozen=True, slots=True)
class Finished:
    """What a batch of endings came to."""

    states: dict[tuple[JobId, Run], JobState]
    """What the rows became of the runs that still owned them."""
    corrected: set[tuple[JobId, Run]]
    """Runs of which a call stood in suspense until now: whoever counted that must count anew."""


@dataclass(frozen=True, slots=True)
class Reaped:
    id: JobId
    queue: Queue
    state: JobState


@dataclass(frozen=True, slots=True)
class LedgerHold:
    """A hold as its call's row has it."""

    open: bool
    cost: NanoUSD
    suspense: NanoUSD


async def claim_jobs(database: Database, ids: Sequence[JobId], worker: WorkerId, lease: timedelta) -> Claims:
    """Claim those of the rows that are queued and due; each claim raises the row's run."""
    rows = await database.fetch(_SQL["claim_jobs"], ids, worker, lease.total_seconds())
    return Claims([_claimed(row) for row in rows], rows[0]["configuration"] if rows else None)


def _claimed(row: asyncpg.Record) -> ClaimedJob:
    return ClaimedJob(
        id=JobId(row["id"]),
        run=Run(row["run"]),
        queue=queue_of(row),
        endpoint=Endpoint(row["endpoint"]),
        body=row["body"],
        attempts=row["attempts"],
        max_attempts=row["max_attempts"],
        created_at=row["created_at"],
        waited=row["waited"],
        has_webhook=row["has_webhook"],
        traceparent=row["traceparent"],
        answer=(Run(row["answer"][0]), CallNumber(row["answer"][1])) if row["answer"] else None,
    )


async def look_up(database: Database, ids: Sequence[JobId]) -> list[Standing]:
    """Say where rows stand; an id without a row does not come back."""
    return [
        Standing(JobId(row["id"]), JobState(row["state"]), timedelta(seconds=row["due_in"] or 0))
        for row in await database.fetch(_SQL["look_up"], ids)
    ]


async def heartbeat(database: Database, held: Sequence[tuple[JobId, Run]], lease: timedelta) -> list[Kept]:
    """Renew leases; a run that does not come back was lost."""
    ids, runs = _in_lock_order(held)
    rows = await database.fetch(_SQL["heartbeat"], ids, runs, lease.total_seconds())
    return [Kept(JobId(row["id"]), row["cancel_requested"]) for row in rows]


def _in_lock_order(held: Sequence[tuple[JobId, Run]]) -> tuple[list[JobId], list[Run]]:
    """Statements that lock several rows take them by id, so that no two wait for each other."""
    ordered = sorted(held)
    return [job for job, _ in ordered], [run for _, run in ordered]


async def open_calls(database: Database, epoch: int, intents: Sequence[Intent]) -> set[JobId]:
    """Write the intents of calls that are about to be sent; return the jobs whose may be.

    The others' epoch is over, or their row has moved on: they must not be sent.
    """
    rows = await database.fetch(
        _SQL["open_calls"],
        epoch,
        [intent.job_id for intent in intents],
        [intent.run for intent in intents],
        [intent.call for intent in intents],
        [intent.provider for intent in intents],
        [intent.model for intent in intents],
        [intent.hold_id for intent in intents],
        [intent.held for intent in intents],
        [intent.held_at for intent in intents],
        ["\n".join(intent.scopes) for intent in intents],
        [intent.price_version for intent in intents],
    )
    return {JobId(row["job_id"]) for row in rows}


async def finish(
    database: Database,
    worker: WorkerId,
    shard: int,
    *,
    conclusions: Sequence[Conclusion],
    attempts: Sequence[AttemptRecord],
    ends: Sequence[RunEnd],
) -> Finished:
    """Conclude calls, record attempts and end runs in one statement.

    A run that would have been put back is cancelled when that was asked for. The bill of a
    run that owns its row no more is booked all the same.
    """
    ends = sorted(ends, key=lambda end: end.job_id)
    states = [_row_state(end.outcome) for end in ends]
    rows = await database.fetch(
        _SQL["finish"],
        *_conclusion_columns(conclusions),
        shard,
        worker,
        *_attempt_columns(attempts),
        [end.job_id for end in ends],
        [end.run for end in ends],
        [state.state for state in states],
        [end.attempts for end in ends],
        [state.error_class for state in states],
        [state.error for state in states],
        [state.waiting_for for state in states],
        [end.result[1] if end.result else None for end in ends],
        [state.delay for state in states],
        [c.usage.cache_write_tokens for c in conclusions],
        [end.result[0] if end.result else None for end in ends],
    )
    ended: dict[tuple[JobId, Run], JobState] = {}
    corrected: set[tuple[JobId, Run]] = set()
    for row in rows:
        run = JobId(row["id"]), Run(row["run"])
        if row["state"] is None:
            corrected.add(run)
        else:
            ended[run] = JobState(row["state"])
    return Finished(ended, corrected)


def _conclusion_columns(conclusions: Sequence[Conclusion]) -> tuple[list[object], ...]:
    return (
        [c.job_id for c in conclusions],
        [c.run for c in conclusions],
        [c.call for c in conclusions],
        [c.state for c in conclusions],
        [c.status for c in conclusions],
        [c.error_class for c in conclusions],
        [c.request_id for c in conclusions],
        [c.usage.prompt_tokens for c in conclusions],
        [c.usage.cached_tokens for c in conclusions],
        [c.usage.completion_tokens for c in conclusions],
        [c.usage.reasoning_tokens for c in conclusions],
        [c.cost for c in conclusions],
        [c.suspense for c in conclusions],
        [c.answer for c in conclusions],
        [c.latency.total_seconds() for c in conclusions],
    )


def _attempt_columns(attempts: Sequence[AttemptRecord]) -> tuple[list[object], ...]:
    return (
        [a.job_id for a in attempts],
        [a.run for a in attempts],
        [a.number for a in attempts],
        [a.call for a in attempts],
        [a.outcome for a in attempts],
        [a.error_class for a in attempts],
        [a.error for a in attempts],
    )


@dataclass(frozen=True, slots=True)
class _RowState:
    state: JobState
    error_class: ErrorClass | None = None
    error: str | None = None
    waiting_for: WaitReason | None = None
    delay: float = 0


def _row_state(outcome: Outcome) -> _RowState:
    match outcome:
        case Succeeded():
            return _RowState(JobState.SUCCEEDED)
        case Retry(delay, failure):
            return _RowState(
                JobState.QUEUED, failure.error_class, failure.message, WaitReason.RETRY, delay.total_seconds()
            )
        case Snoozed(delay, reason):
            return _RowState(JobState.QUEUED, waiting_for=reason, delay=delay.total_seconds())
        case Cancelled():
            return _RowState(JobState.CANCELLED, ErrorClass.CANCELLED, "cancelled while it ran")
        case Failed(failure):
            return _RowState(JobState.FAILED, failure.error_class, failure.message)
        case Expired(message):
            return _RowState(JobState.EXPIRED, ErrorClass.EXPIRED, message)


async def reap(database: Database, *, limit: int = 500) -> list[Reaped]:
    """Take back jobs whose lease ended; their open calls stand in suspense from now on."""
    rows = await database.fetch(_SQL["reap"], limit)
    return [Reaped(JobId(row["id"]), queue_of(row), JobState(row["state"])) for row in rows]


async def suspend_orphans(database: Database) -> dict[HoldId, NanoUSD]:
    """Put open calls whose run has ended into suspense; return their holds with their amounts."""
    return {
        HoldId(row["hold_id"]): NanoUSD(row["suspense_nano"])
        for row in await database.fetch(_SQL["suspend_orphans"])
    }


async def holds_in_ledger(database: Database, holds: Sequence[HoldId]) -> dict[HoldId, LedgerHold]:
    """Say what became of the calls that holds pay for; a hold without a call is not in it."""
    ids = [hold.split(":", 1)[0] for hold in holds]
    return {
        HoldId(row["hold_id"]): LedgerHold(
            row["state"] == "open", NanoUSD(row["cost_nano"]), NanoUSD(row["suspense_nano"])
        )
        for row in await database.fetch(_SQL["holds_in_ledger"], ids, holds)
    }
