"""How the same run goes on after a call that came to nothing: elsewhere, again, or not at all."""

from datetime import timedelta
from functools import partial

from headrace_shared.errors import InvalidRequest
from headrace_shared.outcome import Failed, Failure, Outcome, Retry, Snoozed, WaitReason
from headrace_shared.routes import Route, Trouble, trouble_of
from headrace_workers.choosing import Choosing, Met
from headrace_workers.configured import Configured
from headrace_workers.execution import Again, Ask, Run
from headrace_workers.last_resort import static_answer
from headrace_workers.offers import most_cost

_AT_ONCE = timedelta(0)


class Onward:
    """Decides it. Each call that failed is an attempt, wherever it went: so they stay bounded."""

    def __init__(self, configured: Configured, choosing: Choosing) -> None:
        self._configured = configured
        self._choosing = choosing

    def __call__(self, run: Run, outcome: Outcome, attempts: int) -> Again | None:
        """Return the run's next call; None when the run ends with this outcome.

        Args:
            run: as its last call left it.
            outcome: what it would end as.
            attempts: attempts of the job that have failed by now.

        """
        if run.ask is None:
            # A handler begins anew in a run of its own, which replays what this one leaves.
            return None
        match outcome:
            case Snoozed() if run.downgraded:
                # Its budget has no room elsewhere either: it would come back here at once.
                return None
            case Snoozed(_, WaitReason.BREAKER):
                return self._elsewhere(run, run.ask, attempts, Trouble.DOWN)
            case Snoozed(_, WaitReason.LIMIT):
                return self._elsewhere(run, run.ask, attempts, Trouble.RATE_LIMITED)
            case Retry() | Failed():
                return self._after_failure(run, run.ask, outcome, attempts)
            case _:
                return None

    def _after_failure(self, run: Run, ask: Ask, outcome: Retry | Failed, attempts: int) -> Again | None:
        trouble = trouble_of(outcome.failure.error_class)
        lasts = isinstance(outcome, Failed) or not run.downgraded
        if trouble is not None and lasts and attempts < run.job.max_attempts:
            elsewhere = self._elsewhere(run, ask, attempts, trouble)
            if elsewhere is not None:
                return elsewhere
        match outcome:
            case Retry(delay):
                return self._again(run, attempts, delay)
            case Failed(failure):
                return self._last_resort(run, ask, failure, attempts)

    def _elsewhere(self, run: Run, ask: Ask, attempts: int, trouble: Trouble) -> Again | None:
        """Go on with the next target at once, where there is one that can take a call now."""
        route = self._route(ask)
        if run.target is None or route is None:
            return None
        met = (*run.met, Met(run.target, trouble))
        target = self._choosing.next(route, met, partial(most_cost, self._configured.now, ask))
        if target is None:
            return None
        return Again(run.again(attempts, met=met, bound_for=target), _AT_ONCE)

    def _again(self, run: Run, attempts: int, delay: timedelta) -> Again | None:
        """Begin anew after a short wait; what a model said of the request itself, it would say again."""
        if delay > self._configured.now.retries.slot_wait:
            return None
        lasting = tuple(one for one in run.met if one.trouble.is_of_the_request)
        return Again(run.again(attempts, met=lasting, is_retry=True), delay)

    def _last_resort(self, run: Run, ask: Ask, failure: Failure, attempts: int) -> Again | None:
        route = self._route(ask)
        if route is None or route.answer is None or trouble_of(failure.error_class) is None:
            return None
        answer = static_answer(ask.endpoint, route.answer, route.name, run.job)
        return None if answer is None else Again(run.again(attempts, last_resort=answer), _AT_ONCE)

    def _route(self, ask: Ask) -> Route | None:
        try:
            return self._configured.now.configuration.resolve_route(ask.route)
        except InvalidRequest:
            return None
