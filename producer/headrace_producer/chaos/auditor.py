"""Judges a run: each invariant, with how often it was checked and how it was broken."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import TypeVar
from uuid import UUID

from headrace_producer.chaos.evidence import Booked, Evidence
from headrace_producer.chaos.records import CallRow, JobRow
from headrace_producer.chaos.stage import SLOTS
from headrace_producer.chaos.watcher import RECOVERY

MOST_LINES = 200
"""Of one process in any ten seconds, in which several faults may be logged, with stacks."""
MOST_DIALS = 400
"""Connections of one worker to Postgres and Redis in any ten seconds, in which both may refuse it."""
MOST_CONNECTIONS = 4 * SLOTS + 40
"""Sockets of one worker: its calls, its callbacks, its ways to Postgres and Redis."""

_LOOK = timedelta(milliseconds=500)
"""How late a recovery may be seen: from one look at the store to the next."""
_SLACK = timedelta(seconds=1)
"""A statement is under way for so long at most between its snapshot and its commit."""
_CLOCKS = timedelta(milliseconds=50)
"""How far the clock of the store and that of a receiver may be apart."""


class Verdict(StrEnum):
    """What a run says about one invariant."""

    KEPT = "kept"
    BROKEN = "broken"
    NOT_CHECKED = "not checked"


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of one invariant."""

    invariant: str
    claim: str
    checks: int
    violations: Sequence[str]

    @property
    def verdict(self) -> Verdict:
        if self.violations:
            return Verdict.BROKEN
        return Verdict.KEPT if self.checks else Verdict.NOT_CHECKED


def audit(evidence: Evidence) -> list[Finding]:
    """Check every invariant."""
    return [Finding(name, claim, *check(evidence)) for name, (claim, check) in _INVARIANTS.items()]


Item = TypeVar("Item")
Key = TypeVar("Key")
_Checked = tuple[int, list[str]]


def _accepted_is_durable(evidence: Evidence) -> _Checked:
    jobs = {job.id: job for job in evidence.jobs}
    found: list[str] = []
    for key, ids in evidence.promises.acked.items():
        for job_id in ids:
            job = jobs.get(job_id)
            if job is None:
                found.append(f"job {job_id} ({key}) was acked and does not exist")
            elif job.ended_at is None:
                found.append(
                    f"job {job_id} ({key}) was acked and is {job.state}, waiting for {job.waiting_for}"
                )
    found += [f"{key} was refused: {why}" for key, why in evidence.promises.refused.items()]
    return len(evidence.promises.acked) + len(evidence.promises.refused), found


def _one_ending(evidence: Evidence) -> _Checked:
    found = list(evidence.seen.changed)
    answered = {(call.job, call.run, call.call) for call in evidence.calls if call.state == "answered"}
    events = Counter(delivery.job for delivery in evidence.deliveries)
    for job in evidence.jobs:
        first = evidence.seen.endings.get(job.id)
        now = (job.state, job.run, job.result_run, job.result_call)
        if first and now != (first.state, first.run, first.result_run, first.result_call):
            found.append(f"job {job.id} was {first.in_words}, and is {job.state} in run {job.run}")
        if job.state == "succeeded" and (job.answered_by, job.result_run, job.result_call) not in answered:
            found.append(f"job {job.id} succeeded without an answer")
        if job.ended_at is not None and events[job.id] != int(job.has_webhook):
            found.append(f"job {job.id} has {events[job.id]} callbacks instead of {int(job.has_webhook)}")
    acked = evidence.promises.acked
    found += [f"{key} was acked as {len(ids)} jobs" for key, ids in acked.items() if len(ids) > 1]
    return len(evidence.jobs) + len(evidence.seen.endings) + len(evidence.promises.acked), found


def _no_stale_write(evidence: Evidence) -> _Checked:
    jobs = {job.id: job for job in evidence.jobs}
    found = list(evidence.seen.two_holders)
    found += [
        f"job {job.id} has its result from run {job.result_run} of {job.run}"
        for job in evidence.jobs
        if job.result_run is not None and job.answered_by == job.id and job.result_run > job.run
    ]
    for call in evidence.calls:
        owner, later = jobs.get(call.job), evidence.seen.runs.get((call.job, call.run + 1))
        if owner is None or call.run > owner.run:
            found.append(f"a call was made for run {call.run} of job {call.job}, which it never had")
        elif later is not None and call.opened_at > later + _SLACK:
            found.append(f"run {call.run} of job {call.job} made a call when run {call.run + 1} had begun")
    for attempt in evidence.attempts:
        owner, holder = jobs.get(attempt.job), evidence.seen.holders.get((attempt.job, attempt.run))
        if owner is None or attempt.run > owner.run:
            found.append(
                f"an attempt was recorded for run {attempt.run} of job {attempt.job}, which it never had"
            )
        elif holder is not None and holder != attempt.worker:
            found.append(
                f"{attempt.worker} recorded an attempt for run {attempt.run} of job {attempt.job}, "
                f"which {holder} held"
            )
    return len(evidence.jobs) + len(evidence.calls) + len(evidence.attempts) + len(
        evidence.seen.holders
    ), found


def _ledger_is_the_bill(evidence: Evidence) -> _Checked:
    booked, calls = _booked_by_job(evidence), _by_job(evidence.calls, lambda call: call.job)
    found: list[str] = []
    for job in evidence.jobs:
        found += _bill_of(job, calls[job.id], booked[job.id])
    found += [
        f"the provider answered {one.id}, which nobody asked for"
        for one in evidence.booked
        if one.key is None and (one.answered or one.cost)
    ]
    ledger = sum(call.cost for call in evidence.calls)
    suspense = sum(call.suspense for call in evidence.calls)
    books = sum(one.cost for one in evidence.booked)
    if not ledger <= books <= ledger + suspense:
        found.append(f"not {ledger} <= {books} <= {ledger + suspense} nano-USD in all")
    return 3 * len(evidence.jobs) + 1, found


def _bill_of(job: JobRow, calls: Sequence[CallRow], booked: Sequence[Booked]) -> Iterable[str]:
    ledger = sum(call.cost for call in calls)
    suspense = sum(call.suspense for call in calls)
    books = sum(one.cost for one in booked)
    if not ledger <= books <= ledger + suspense:
        yield f"job {job.id}: not {ledger} <= {books} <= {ledger + suspense} nano-USD"
    answered = sum(one.answered for one in booked)
    known = sum(call.state in ("answered", "suspense") for call in calls)
    if answered > known:
        yield f"job {job.id}: the provider answered {answered} calls, the ledger knows {known}"
    known_ids = {one.id for one in booked}
    for call in calls:
        if call.state == "answered" and call.request_id not in known_ids:
            yield f"job {job.id}: the provider knows nothing of call {call.run}/{call.call}"
    yield from _paid_twice(job, calls)


def _paid_twice(job: JobRow, calls: Sequence[CallRow]) -> Iterable[str]:
    good = [call for call in calls if call.state == "answered" and call.error_class is None]
    first = min((call.ended_at for call in good if call.ended_at is not None), default=None)
    for call in calls:
        if first is not None and call.opened_at > first + _SLACK:
            yield f"job {job.id}: call {call.run}/{call.call} was made when an answer had been committed"


def _never_over_budget(evidence: Evidence) -> _Checked:
    found = list(evidence.seen.over_budget)
    if evidence.calm.drained and evidence.calm.held:
        found.append(f"{evidence.calm.held} nano-USD are held although every job has ended")
    return evidence.seen.samples + 1, found


def _bounded_calls(evidence: Evidence) -> _Checked:
    booked, calls = _booked_by_job(evidence), _by_job(evidence.calls, lambda call: call.job)
    attempts = Counter(attempt.job for attempt in evidence.attempts)
    found: list[str] = []
    for job in evidence.jobs:
        asked, intents = len(booked[job.id]), len(calls[job.id])
        if asked > intents:
            found.append(f"job {job.id}: {asked} calls reached the provider, {intents} were intended")
        # A call that was no attempt was the last of its run: it was interrupted, or lost with its worker.
        if intents > attempts[job.id] + job.run:
            found.append(f"job {job.id}: {intents} calls in {job.run} runs and {attempts[job.id]} attempts")
    return 2 * len(evidence.jobs), found


def _callbacks(evidence: Evidence) -> _Checked:
    jobs = {job.id: job for job in evidence.jobs}
    received = _by_job(evidence.received, lambda one: one.job)
    found: list[str] = []
    checks = 0
    for job in evidence.jobs:
        if job.has_webhook and job.ended_at is not None:
            checks += 1
            if not any(one.accepted for one in received.get(job.id, ())):
                found.append(f"job {job.id} ended, and its receiver never took its callback")
    for job_id, deliveries in received.items():
        checks += len(deliveries)
        owner = None if job_id is None else jobs.get(job_id)
        if len({one.id for one in deliveries}) > 1:
            found.append(f"job {job_id} was called back under several ids")
        if owner is None or not owner.has_webhook:
            found.append(f"job {job_id} was called back and should not be")
        elif owner.ended_at is None or min(one.at for one in deliveries) < owner.ended_at - _CLOCKS:
            found.append(f"job {job_id} was called back before it had ended")
    found += [
        f"a callback of job {one.job} was not signed well" for one in evidence.received if not one.verified
    ]
    return checks, found


def _recovery(evidence: Evidence) -> _Checked:
    found: list[str] = []
    for one in evidence.seen.recoveries:
        if one.left:
            found.append(f"{one.left} jobs of {one.worker} never came back")
        elif one.jobs and one.seconds - one.away > (RECOVERY + _LOOK).total_seconds():
            found.append(
                f"the {one.jobs} jobs of {one.worker} came back after {one.seconds:.1f} s, "
                f"for {one.away:.1f} s of which a server was away"
            )
    return sum(one.jobs for one in evidence.seen.recoveries), found


def _heals_itself(evidence: Evidence) -> _Checked:
    found = list(evidence.calm.accidents)
    if not evidence.calm.drained:
        found.append(f"it did not drain: {evidence.calm.standing}")
    return 1 + len(evidence.logs), found


def _no_hot_loop(evidence: Evidence) -> _Checked:
    found = [
        f"{log.name} wrote {log.busiest} lines in ten seconds"
        for log in evidence.logs
        if log.busiest > MOST_LINES
    ]
    found += [
        f"{name} had {count} connections"
        for name, count in evidence.seen.connections.items()
        if count > MOST_CONNECTIONS
    ]
    found += [
        f"{name} made {count} connections in ten seconds"
        for name, count in evidence.seen.dials.items()
        if count > MOST_DIALS
    ]
    return len(evidence.logs) + len(evidence.seen.connections) + len(evidence.seen.dials), found


def _no_leak(evidence: Evidence) -> _Checked:
    return evidence.leaks.checks, list(evidence.leaks.found)


_INVARIANTS: Mapping[str, tuple[str, Callable[[Evidence], _Checked]]] = {
    "I1": ("every job that was acked exists and ended", _accepted_is_durable),
    "I2": ("one ending, at most one result, one callback", _one_ending),
    "I3": ("nothing was written by a run that had lost its job", _no_stale_write),
    "I4": ("ledger <= provider's books <= ledger + suspense, no answer paid twice", _ledger_is_the_bill),
    "I5": ("settled + suspense + held <= limit, nothing left held", _never_over_budget),
    "I6": ("no call without an intent, no more calls than runs and attempts", _bounded_calls),
    "I7": ("every ending was called back, signed, under one id, not before it", _callbacks),
    "I8": (f"a dead worker's jobs are back within {RECOVERY.total_seconds():g} s", _recovery),
    "I9": ("everything drained, and no process ended by itself", _heals_itself),
    "I10": (
        f"at most {MOST_LINES} log lines and {MOST_DIALS} new connections in 10 s, {MOST_CONNECTIONS} open",
        _no_hot_loop,
    ),
    "I11": ("no secret, prompt or key in logs, Redis and spans", _no_leak),
}


def _booked_by_job(evidence: Evidence) -> Mapping[UUID, list[Booked]]:
    by_key = _by_job(evidence.booked, lambda one: one.key)
    found: defaultdict[UUID, list[Booked]] = defaultdict(list)
    for job in evidence.jobs:
        if job.key is not None:
            found[job.id] = by_key[job.key]
    return found


def _by_job(items: Iterable[Item], of: Callable[[Item], Key]) -> defaultdict[Key, list[Item]]:
    found: defaultdict[Key, list[Item]] = defaultdict(list)
    for item in items:
        found[of(item)].append(item)
    return found
