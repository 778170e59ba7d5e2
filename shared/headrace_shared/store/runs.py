"""What a run writes in the store: the intents of its calls, and how it ended.

Every write names the run it was given; a row that has moved on is not changed by it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from headrace_shared.ids import CallNumber, HoldId, JobId, Run, WorkerId
from headrace_shared.job import JobState, Queue
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
from headrace_shared.store.jobs import queue_of
from headrace_shared.store.pool import Database
from headrace_shared.store.sql import Statements
from headrace_shared.usage import NO_USAGE, Usage

_SQL = Statements("runs.sql")


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
    has_allowance: bool = False
    """The job may cost so much and no more: its later runs count this call."""


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
        [intent.job_id for intent in intents if intent.has_allowance],
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
