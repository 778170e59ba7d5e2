"""What workers do with jobs in the store: claim, keep, journal, finish.

Every write names the run it was given; a row that has moved on is not changed by it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

import asyncpg

from headrace_shared.handlers import read_endpoint
from headrace_shared.ids import CallNumber, HoldId, JobId, Lane, Run, WorkerId
from headrace_shared.job import NEEDS_EXPIRY, ClaimedJob, JobState, Queue
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
from headrace_shared.store.pool import Database, json_object
from headrace_shared.store.sql import Statements
from headrace_shared.usage import NO_USAGE, Usage

_SQL = Statements("runs.sql")


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
    needs: tuple[str, ...] = (NEEDS_EXPIRY,)


PLAIN = Abilities()


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
    endpoint: str | None = None
    """Of the call where it is not the job's own."""
    step: str | None = None
    """The name of a handler's call; with the digest, a later run knows its answer by it."""
    digest: bytes | None = None


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
    result: tuple[Run, CallNumber | None] | None = None
    """The call whose answer the job succeeded with; no call when it is what its handler returned."""
    output: bytes | None = None
    """What the handler returned, as JSON: kept with the ending, in one statement."""


@dataclass(frozen=True, slots=True)
class Finished:
    """What a batch of endings came to."""

    states: dict[tuple[JobId, Run], JobState]
    """What the rows became of the runs that still owned them."""
    corrected: set[tuple[JobId, Run]]
    """Runs of which a call stood in suspense until now: whoever counted that must count anew."""


@dataclass(frozen=True, slots=True)
class Reaped:
    """A job that was taken back or ended by somebody else than its run."""

    id: JobId
    queue: Queue
    state: JobState


@dataclass(frozen=True, slots=True)
class LedgerHold:
    """A hold as its call's row has it."""

    open: bool
    cost: NanoUSD
    suspense: NanoUSD


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
    )


async def pick_due(
    database: Database, lanes: Mapping[Lane, int], limit: int, *, abilities: Abilities = PLAIN
) -> list[DueJob]:
    """Return jobs that are due and that a worker can run, from the lanes by their weights."""
    rows = await database.fetch(
        _SQL["pick_due"],
        list(lanes),
        [float(weight) for weight in lanes.values()],
        limit,
        abilities.endpoints,
        abilities.needs,
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


async def put_off(database: Database, ids: Sequence[JobId], delay: timedelta) -> None:
    """Leave queued jobs to a worker that knows how to run them."""
    await database.execute(_SQL["put_off"], ids, delay.total_seconds())


async def expire(database: Database, *, limit: int = 500) -> list[Reaped]:
    """End queued jobs whose time ran out."""
    return [_reaped(row) for row in await database.fetch(_SQL["expire"], limit)]


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


async def open_calls(
    database: Database, epoch: int, intents: Sequence[Intent]
) -> set[tuple[JobId, CallNumber]]:
    """Write the intents of calls that are about to be sent; return those that may be.

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
        [intent.endpoint for intent in intents],
        [intent.step for intent in intents],
        [intent.digest for intent in intents],
    )
    return {(JobId(row["job_id"]), CallNumber(row["call"])) for row in rows}


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
        [end.output for end in ends],
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


async def hasten(database: Database, ids: Sequence[JobId]) -> list[tuple[JobId, Queue]]:
    """Make those of the jobs due at once that wait although they were answered; return them."""
    return [(JobId(row["id"]), queue_of(row)) for row in await database.fetch(_SQL["hasten"], ids)]


async def reap(database: Database, *, spare: timedelta = timedelta(0), limit: int = 500) -> list[Reaped]:
    """Take back jobs whose lease ended; their open calls stand in suspense from now on.

    Args:
        database: where.
        spare: for so long after the start of PostgreSQL nothing is taken back: nobody could renew.
        limit: jobs at most.

    """
    return [_reaped(row) for row in await database.fetch(_SQL["reap"], limit, spare.total_seconds())]


async def quarantine(database: Database, job_id: JobId, worker: WorkerId, how: str) -> Reaped | None:
    """End a job whose own process died; None when it does not run there any more.

    Args:
        database: where.
        job_id: the job that was alone.
        worker: the process it was alone in.
        how: what was seen of the death, for the job's error.

    """
    row = await database.fetchrow(_SQL["quarantine"], job_id, worker, how)
    return _reaped(row) if row else None


async def is_run_by(database: Database, job_id: JobId, worker: WorkerId) -> bool:
    row = await database.fetchrow(_SQL["is_run_by"], job_id, worker)
    return row is not None and row[0] is True


def _reaped(row: asyncpg.Record) -> Reaped:
    return Reaped(JobId(row["id"]), queue_of(row), JobState(row["state"]))


async def suspend_orphans(database: Database) -> dict[HoldId, NanoUSD]:
    """Put open calls whose run has ended into suspense; return their holds with their amounts."""
    return {
        HoldId(row["hold_id"]): NanoUSD(row["amount_nano"])
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
