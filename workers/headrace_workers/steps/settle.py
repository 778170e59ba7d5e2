"""Write down what came of the call and of the run; decide whether the run goes on."""

import logging
from dataclasses import replace
from datetime import timedelta
from typing import TypedDict, Unpack

from headrace_shared.budgets import Settlement
from headrace_shared.dispatch.dispatch import Entry
from headrace_shared.ids import CallNumber
from headrace_shared.logs import Occasional
from headrace_shared.money import ZERO, NanoUSD
from headrace_shared.outcome import (
    Cancelled,
    ErrorClass,
    Expired,
    Failed,
    Failure,
    Outcome,
    Retry,
    Snoozed,
    Succeeded,
    WaitReason,
)
from headrace_shared.store.runs import AttemptRecord, Conclusion, RunEnd
from headrace_shared.usage import Usage
from headrace_workers.breaker import Breakers, is_unhealthy
from headrace_workers.choosing import Choosing
from headrace_workers.configured import Configured
from headrace_workers.execution import Again, Run
from headrace_workers.finisher import REJECTED, Finish, Finisher
from headrace_workers.lengths import Lengths
from headrace_workers.limiting import Limiter
from headrace_workers.onward import Onward
from headrace_workers.replies import Answered, Refused, Unknown
from headrace_workers.retry_budget import RetryBudget
from headrace_workers.retrying import decide
from headrace_workers.telemetry import Metrics

_NO_CALL = Failure(ErrorClass.INTERNAL, "the run ended without a call")

_occasionally = Occasional(logging.getLogger(__name__))


class Settle:
    def __init__(
        self,
        finisher: Finisher,
        configured: Configured,
        choosing: Choosing,
        retries: RetryBudget,
        metrics: Metrics,
        *,
        breakers: Breakers,
        limiter: Limiter,
        lengths: Lengths | None = None,
    ) -> None:
        self._finisher = finisher
        self._limiter = limiter
        self._lengths = lengths
        self._configured = configured
        self._choosing = choosing
        self._breakers = breakers
        self._retries = retries
        self._onward = Onward(configured, choosing)
        self._metrics = metrics

    async def __call__(self, run: Run) -> Again | Outcome:
        """Return how the run goes on, or how it ended."""
        self._settle_limits(run)
        if run.target is not None and run.permit is not None and not run.sent:
            await self._breakers.of(run.target).give_back(run.permit)
        outcome = self._outcome(run)
        attempts = run.attempts + isinstance(outcome, Retry | Failed)
        self._learn(run)
        onward = self._onward(run, outcome, attempts)
        within = _is_within(run)
        finish = Finish(
            entry=Entry(run.job.queue, run.job.id),
            conclusion=_conclusion(run),
            attempt=None if within else _attempt(run, outcome, attempts, goes_on=onward is not None),
            settlement=_settlement(run),
            end=None if onward or within else _end(run, outcome, attempts),
            may_lead=run.job.flight is not None,
            refused_under=run.refused_under,
        )
        self._count(run, finish)
        if run.held and finish.settlement and run.job.allowance:
            cost = NanoUSD(finish.settlement.cost + finish.settlement.suspense)
            run.job.allowance.settle(run.held.amount, cost)
        try:
            owned = await self._finisher.submit(finish)
        except REJECTED as error:
            reduced, ended = _without_content(run, finish, type(error).__name__)
            await self._finisher.submit(reduced)
            return ended
        if not owned:
            self._metrics.fenced_writes()
        if onward and isinstance(outcome, Retry | Failed):
            self._metrics.retried(outcome.failure.error_class)
        return onward or outcome

    def _settle_limits(self, run: Run) -> None:
        if run.admission is not None:
            self._limiter.settle(run.admission, run.reply)
        elif run.call == 1 and run.target is not None and not _is_within(run):
            # It was claimed for a call that was not let go: another job may be, in its place.
            self._limiter.pass_by(run.target)

    def _learn(self, run: Run) -> None:
        if run.target is None:
            return
        self._choosing.ended(run.target, run.reply)
        if isinstance(run.reply, Answered) and run.reply.failure is None and run.last_resort is None:
            self._retries.succeeded(run.target.provider)

    def _count(self, run: Run, finish: Finish) -> None:
        conclusion = finish.conclusion
        if conclusion is None or run.target is None or run.ask is None:
            return
        usage = conclusion.usage if conclusion.state == "answered" else None
        if run.held is not None and conclusion.cost > run.held.amount:
            # The bill is the bill: it is booked, and the bound or the provider's count is wrong.
            _occasionally.error("%s billed more than was held for a call of job %s", run.target, run.job.id)
        self._metrics.call_ended(
            run.target,
            run.ask.endpoint,
            latency=conclusion.latency,
            usage=usage,
            error_class=conclusion.error_class,
        )
        if usage is not None and self._lengths is not None:
            self._lengths.note(run.target, run.ask.endpoint, run.ask.body, usage)
        self._metrics.spent(run.target, run.job.queue.tenant, conclusion.cost, conclusion.suspense)

    def _outcome(self, run: Run) -> Outcome:
        match run.outcome:
            case Failed(failure) if failure.error_class is ErrorClass.INTERNAL:
                return self._after_failure(run, failure)
            case None:
                return self._outcome_of_reply(run)
            case outcome:
                return outcome

    def _outcome_of_reply(self, run: Run) -> Outcome:
        if _is_refused_probe(run):
            # It says how the target is, and nothing of the job: an outage would use up the attempts
            # of those that happen to be sent ahead. One that may have been billed is an attempt.
            return Snoozed(self._configured.now.breaker.cooldown, WaitReason.BREAKER)
        match run.reply:
            case Answered(failure=failure) if failure is None:
                return Succeeded()
            case Answered(failure=failure) | Refused(failure=failure) | Unknown(failure=failure):
                failure = failure or _NO_CALL
            case None:
                failure = _NO_CALL
        return self._after_failure(run, failure)

    def _after_failure(self, run: Run, failure: Failure) -> Retry | Failed:
        return decide(
            self._configured.now.retries,
            failure,
            attempts=run.attempts + 1,
            max_attempts=run.job.max_attempts,
        )


def _is_refused_probe(run: Run) -> bool:
    is_probe = run.permit is not None and run.permit.owner is not None
    return is_probe and isinstance(run.reply, Refused) and is_unhealthy(run.reply)


def _is_within(run: Run) -> bool:
    """Say whether this is a call of a handler's: it ends nothing, and is no attempt of the job."""
    return run.ask is not None and run.ask.step is not None


def _without_content(run: Run, finish: Finish, error: str) -> tuple[Finish, Failed]:
    """Return what can be written of a run whose answer the store refuses: its bill and its end."""
    failure = Failure(ErrorClass.INTERNAL, f"the store refused what came of this run ({error})")
    attempts = run.attempts + 1
    ended = Failed(failure)
    reduced = replace(
        finish,
        conclusion=replace(finish.conclusion, answer=b"", request_id=None) if finish.conclusion else None,
        attempt=None if _is_within(run) else _failed_attempt(run, attempts, None, "failed", failure),
        end=None if _is_within(run) else RunEnd(run.job.id, run.job.run, ended, attempts),
    )
    return reduced, ended


def _conclusion(run: Run) -> Conclusion | None:
    """Say what became of the call, if it may be in the journal."""
    if not run.journalled:
        return None

    def concluded(state: str, latency: timedelta = timedelta(0), **known: Unpack[_Known]) -> Conclusion:
        return Conclusion(run.job.id, run.job.run, run.call, state, latency, **known)

    match run.reply:
        case Answered() as reply:
            return concluded(
                "answered",
                reply.latency,
                status=reply.status,
                error_class=reply.failure.error_class if reply.failure else None,
                request_id=reply.request_id,
                usage=reply.usage,
                cost=_cost(run),
                answer=reply.body,
            )
        case Refused() as reply:
            return concluded(
                "failed",
                reply.latency,
                status=reply.status,
                error_class=reply.failure.error_class,
                request_id=reply.request_id,
                answer=reply.body,
            )
        case Unknown() as reply:
            return concluded(
                "suspense",
                reply.latency,
                status=reply.status,
                error_class=reply.failure.error_class,
                request_id=reply.request_id,
                suspense=_suspense(run),
            )
        case None if run.sent:
            return concluded("suspense", error_class=ErrorClass.CANCELLED, suspense=_suspense(run))
        case None:
            return concluded("failed", error_class=ErrorClass.CANCELLED)


class _Known(TypedDict, total=False):
    status: int | None
    error_class: ErrorClass | None
    request_id: str | None
    usage: Usage
    cost: NanoUSD
    suspense: NanoUSD
    answer: bytes | None


def _cost(run: Run) -> NanoUSD:
    if run.price is None or not isinstance(run.reply, Answered):
        return ZERO
    return run.price.cost(run.reply.usage, run.request.hosted if run.request else None)


def _suspense(run: Run) -> NanoUSD:
    return run.held.amount if run.held else ZERO


def _settlement(run: Run) -> Settlement | None:
    if run.held is None:
        return None
    in_suspense = isinstance(run.reply, Unknown) or (run.reply is None and run.sent)
    return Settlement(run.held.id, _cost(run), _suspense(run) if in_suspense else ZERO)


def _attempt(run: Run, outcome: Outcome, attempts: int, *, goes_on: bool) -> AttemptRecord | None:
    call = run.call if run.journalled else None
    match outcome:
        case Succeeded():
            return AttemptRecord(run.job.id, run.job.run, attempts + 1, call, "succeeded")
        case Retry(_, failure):
            return _failed_attempt(run, attempts, call, "retried", failure)
        case Failed(failure):
            return _failed_attempt(run, attempts, call, "retried" if goes_on else "failed", failure)
        case Snoozed() | Cancelled() | Expired():
            return None


def _failed_attempt(
    run: Run, number: int, call: CallNumber | None, outcome: str, failure: Failure
) -> AttemptRecord:
    return AttemptRecord(run.job.id, run.job.run, number, call, outcome, failure.error_class, failure.message)


def _end(run: Run, outcome: Outcome, attempts: int) -> RunEnd:
    result = None
    if isinstance(outcome, Succeeded):
        result = run.job.answer or (run.job.run, None if run.ask is None else run.call)
    return RunEnd(run.job.id, run.job.run, outcome, attempts, result, run.output)
