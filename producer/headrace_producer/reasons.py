"""What a job waits for, or how it stands otherwise: a closed vocabulary, and its words."""

import math
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from typing import ClassVar, TypeAlias, assert_never

from headrace_producer.words import count, in_words
from headrace_shared.handlers import HandlerName
from headrace_shared.ids import Lane, WorkerId
from headrace_shared.job import JobState
from headrace_shared.money import NanoUSD, format_usd
from headrace_shared.outcome import WaitReason
from headrace_shared.routes import Target
from headrace_shared.store.money import WindowKind
from headrace_shared.store.waits import MOST_COUNTED, OpenCall

_MUCH_LESS = 0.98
"""Of a limit: no limit is used to the last hair, and that is not worth a word."""


@dataclass(frozen=True, slots=True)
class HasEnded:
    """Nothing comes after it."""

    code: ClassVar = "ended"
    state: JobState
    at: datetime
    error_class: str | None
    error: str | None


@dataclass(frozen=True, slots=True)
class IsRunning:
    code: ClassVar = "running"
    worker: WorkerId
    run: int
    first_started_at: datetime | None
    lease_left: timedelta
    """Less than nothing: its worker did not renew it, and somebody takes it back."""
    call: OpenCall | None
    call_for: timedelta
    """How long that call has been out."""
    cancelling: bool


@dataclass(frozen=True, slots=True)
class RanOutOfTime:
    """It is about to be ended as expired."""

    code: ClassVar = "out_of_time"
    at: datetime


@dataclass(frozen=True, slots=True)
class NotDue:
    """It has a time to come first."""

    code: ClassVar = "run_at"
    until: datetime
    left: timedelta
    put_back_for: WaitReason | None
    """Why it was put back; None for one that was never begun."""
    attempts: int
    max_attempts: int
    error_class: str | None
    """Of its last attempt."""


@dataclass(frozen=True, slots=True)
class IsPaused:
    code: ClassVar = "pause"
    scope: str
    since: datetime
    until: datetime | None
    left: timedelta | None


@dataclass(frozen=True, slots=True)
class NobodyServes:
    """No live worker serves its lane, or has its handler."""

    code: ClassVar = "worker"
    lane: Lane
    handler: HandlerName | None
    workers: int


@dataclass(frozen=True, slots=True)
class BreakerIsOpen:
    """None of its targets is called."""

    code: ClassVar = "breaker"
    target: Target
    """The one that can be asked first."""
    targets: int
    failed: int
    calls: int
    """In the breaker's window."""
    left: timedelta | None
    """Until a probe may go, or an operator's time is over; None where one keeps it open for good."""
    by_hand: bool
    probing: bool


@dataclass(frozen=True, slots=True)
class BudgetIsSpent:
    code: ClassVar = "budget"
    scope: str
    kind: WindowKind
    limit: NanoUSD
    settled: NanoUSD
    suspense: NanoUSD
    held: NanoUSD
    needs: NanoUSD | None
    """What its next call can cost; None where that is not known before it runs."""
    left: timedelta | None
    """Until the window turns; None for a total."""

    @property
    def remaining(self) -> NanoUSD:
        return NanoUSD(self.limit - self.settled - self.suspense - self.held)


@dataclass(frozen=True, slots=True)
class LimitIsReached:
    """None of its targets has room under the limits of providers."""

    code: ClassVar = "limit"
    limiter: str
    """The provider, or the one of its models, whose limit it is."""
    targets: int
    """Of its route; the limiter is that of the one that has room first."""
    what: str
    """`requests` or `tokens` a minute, `concurrent` calls, or `cooling`: it refused a call of late."""
    limit: int | None
    """None where only refusals are known, and while it cools."""
    in_force: int | None
    """Less than the limit after refusals, and while others use it as well."""
    used: int
    left: timedelta | None
    """Until the next call may go; where one has to end first as fast as they did of late, None if unknown."""


@dataclass(frozen=True, slots=True)
class CapIsReached:
    """Its owner runs as many jobs at a time as it may."""

    code: ClassVar = "cap"
    scope: str
    """Whose cap: `tenant:NAME` or `key:NAME`."""
    running: int
    limit: int
    left: timedelta | None
    """Until one of them ends, if its queue goes on as it did of late."""


@dataclass(frozen=True, slots=True)
class RunsAlone:
    """Its runs lost their workers: it runs in a process of its own, one at a time."""

    code: ClassVar = "alone"
    crashes: int


@dataclass(frozen=True, slots=True)
class WaitsItsTurn:
    code: ClassVar = "turn"
    before: int
    """Jobs of its queue that are due and before it; `MOST_COUNTED` + 1 stands for more."""
    running: int
    slots: int
    left: timedelta | None
    """If its queue goes on as it did of late."""


@dataclass(frozen=True, slots=True)
class WaitsForASlot:
    """It is the next of its queue."""

    code: ClassVar = "slot"
    running: int
    slots: int


@dataclass(frozen=True, slots=True)
class IsNext:
    """Nothing is in its way: a worker is about to claim it."""

    code: ClassVar = "next"
    running: int
    slots: int


Reason: TypeAlias = (
    HasEnded
    | IsRunning
    | RanOutOfTime
    | NotDue
    | IsPaused
    | NobodyServes
    | BreakerIsOpen
    | BudgetIsSpent
    | LimitIsReached
    | CapIsReached
    | RunsAlone
    | WaitsItsTurn
    | WaitsForASlot
    | IsNext
)


def words_of(reason: Reason) -> str:  # noqa: C901, PLR0911, PLR0912 - one case for each of the vocabulary
    """Say in words what follows "the job"."""
    match reason:
        case HasEnded():
            return _ended(reason)
        case IsRunning():
            return _running(reason)
        case RanOutOfTime(at):
            return f"ran out of time at {_moment(at)}, and is about to end as expired"
        case NotDue():
            return _not_due(reason)
        case IsPaused(scope, since, until):
            what = "everything" if scope == "global" else scope
            end = "until it is resumed" if until is None else f"until {_moment(until)}"
            return f"waits because {what} is paused, since {_moment(since)} and {end}"
        case NobodyServes():
            return _nobody(reason)
        case BreakerIsOpen():
            return _breaker(reason)
        case BudgetIsSpent():
            return _budget(reason)
        case LimitIsReached():
            return _limit(reason)
        case CapIsReached(scope, running, limit, left):
            end = "" if left is None else f"; as fast as of late one of them ends in {_soon(left)}"
            return (
                f"waits because {scope} runs {count(running, 'job')}, of {limit:,} that it may at a time{end}"
            )
        case RunsAlone(crashes):
            return f"waits for a process of its own, because {crashes} of its runs lost their worker"
        case WaitsItsTurn(before, running, slots, left):
            jobs = f"more than {MOST_COUNTED:,} jobs" if before > MOST_COUNTED else count(before, "job")
            expected = "" if left is None else f"; as fast as of late that takes about {_soon(left)}"
            are = "is" if before == 1 else "are"
            return (
                f"waits for its turn: {jobs} of its queue {are} before it, "
                f"and {running:,} of {count(slots, 'slot')} are taken{expected}"
            )
        case WaitsForASlot(running, slots):
            taken = f"{running:,} of {count(slots, 'slot')} are taken"
            return f"waits for a slot: it is the next of its queue, and {taken}"
        case IsNext(running, slots):
            return f"is claimed next: {running:,} of {count(slots, 'slot')} are taken"
        case _:
            assert_never(reason)


def _ended(reason: HasEnded) -> str:
    how = f"{reason.state} at {_moment(reason.at)}"
    if reason.state in (JobState.SUCCEEDED, JobState.CANCELLED) or reason.error is None:
        return how
    return f"{how} ({reason.error_class}): {reason.error.rstrip('.')}"


def _running(reason: IsRunning) -> str:
    since = f" since {_moment(reason.first_started_at)}" if reason.first_started_at else ""
    again = "" if reason.run == 1 else f", in its run {reason.run}"
    lease = (
        f"its lease is renewed within {_soon(reason.lease_left)}"
        if reason.lease_left > timedelta(0)
        else f"its lease ended {_soon(-reason.lease_left)} ago, and another worker takes it over"
    )
    call = ""
    if reason.call is not None:
        call = f"; its call to {reason.call.target} has been out for {_soon(reason.call_for)}"
    stop = "; it is told to stop" if reason.cancelling else ""
    return f"runs on {reason.worker}{since}{again}; {lease}{call}{stop}"


def _not_due(reason: NotDue) -> str:
    until = f"until {_moment(reason.until)} ({_soon(reason.left)})"
    match reason.put_back_for:
        case None:
            return f"waits {until}: it is not due before"
        case WaitReason.RETRY:
            last = f", the last as {reason.error_class}" if reason.error_class else ""
            failed = f"{reason.attempts:,} of at most {reason.max_attempts:,} failed{last}"
            return f"waits {until} for its next attempt: {failed}"
        case other:
            return f"was put back {until}, because {_put_back(other)}"


def _put_back(reason: WaitReason) -> str:  # noqa: C901, PLR0911 - one case for each of the vocabulary
    match reason:
        case WaitReason.RETRY:
            return "its attempt failed"
        case WaitReason.BREAKER:
            return "its target's breaker was open"
        case WaitReason.BUDGET:
            return "a budget had no room for it"
        case WaitReason.LIMIT:
            return "a limit was reached"
        case WaitReason.PAUSE:
            return "it was paused"
        case WaitReason.SERVERS:
            return "PostgreSQL or Redis was away"
        case WaitReason.EPOCH:
            return "the counters of budgets were put in place anew"
        case WaitReason.SHUTDOWN:
            return "its worker stopped"
        case WaitReason.LOST_LEASE:
            return "its worker was lost"
        case WaitReason.WORKER:
            return "no worker that saw it knows how to run it"
        case WaitReason.FLIGHT:
            return "an identical job is making the call for both"
        case _:
            assert_never(reason)


def _nobody(reason: NobodyServes) -> str:
    if not reason.workers:
        return "waits for a worker: none is alive (start one with 'headrace worker')"
    alive = f"of {count(reason.workers, 'worker')} that {'is' if reason.workers == 1 else 'are'} alive none"
    if reason.handler is not None:
        return f"waits for a worker: {alive} has the handler {reason.handler} in the lane {reason.lane}"
    return f"waits for a worker: {alive} serves the lane {reason.lane}"


def _breaker(reason: BreakerIsOpen) -> str:
    which = f"the breaker of {reason.target}"
    if reason.targets > 1:
        which = f"the breakers of its {reason.targets} targets, {reason.target} first"
    if reason.by_hand:
        end = "until it is closed by hand" if reason.left is None else f"for {_soon(reason.left)}"
        return f"waits for {which}: opened by hand, {end}"
    counted = f" ({reason.failed:,} of {count(reason.calls, 'call')} failed)" if reason.calls else ""
    if reason.probing:
        return f"waits for {which}: open{counted}, and a probe is out"
    left = f"in {_soon(reason.left)}" if reason.left else "now"
    return f"waits for {which}: open{counted}, and a probe may go {left}"


def _budget(reason: BudgetIsSpent) -> str:
    needs = "" if reason.needs is None else f", and its call can cost {format_usd(reason.needs)}"
    turns = "" if reason.left is None else f"; the {reason.kind} turns in {_soon(reason.left)}"
    return (
        f"waits for the {reason.kind} budget of {reason.scope}: of {format_usd(reason.limit)} "
        f"{format_usd(reason.settled)} are settled, {format_usd(reason.suspense)} in suspense and "
        f"{format_usd(reason.held)} held{needs}{turns}"
    )


def _limit(reason: LimitIsReached) -> str:
    whose = reason.limiter if reason.targets == 1 else f"its {reason.targets} targets, {reason.limiter} first"
    left = "" if reason.left is None else f"; the next call may go in {_soon(reason.left)}"
    if reason.what == "cooling":
        return f"waits for the limit of {whose}: it refused a call{left}"
    unit = "calls under way" if reason.what == "concurrent" else f"{reason.what} a minute of late"
    most = "" if reason.limit is None else f", of {reason.limit:,}"
    if reason.in_force is not None and reason.in_force < _MUCH_LESS * (reason.limit or math.inf):
        most += (
            f", of which {reason.in_force:,} are in force" if most else f", of {reason.in_force:,} in force"
        )
    return f"waits for the limit of {whose}: {reason.used:,} {unit}{most}{left}"


def _moment(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S %Z}"


def _soon(duration: timedelta) -> str:
    return "less than a second" if duration < timedelta(seconds=1) else in_words(duration)


def parts_of(reason: Reason) -> dict[str, object]:
    """Return what a reason is made of, as values that JSON can carry; `reason` names it."""
    parts: dict[str, object] = {"reason": reason.code}
    for field in fields(reason):
        value: object = getattr(reason, field.name)
        match value:
            case timedelta():
                parts[f"{field.name}_seconds"] = value.total_seconds()
            case None if field.name == "left":
                parts["left_seconds"] = None
            case int() if isinstance(reason, BudgetIsSpent):
                parts[f"{field.name}_nano_usd"] = value
            case datetime():
                parts[field.name] = value.isoformat()
            case Target():
                parts[field.name] = str(value)
            case OpenCall():
                parts[field.name] = str(value.target)
                parts["call_held_nano_usd"] = value.held
            case _:
                parts[field.name] = value
    return parts | {"words": words_of(reason)}
