"""A call that is made again goes out only while the fleet's retries are few beside its successes."""

from headrace_shared.outcome import Snoozed, WaitReason
from headrace_workers.breaker import Breakers
from headrace_workers.execution import Run
from headrace_workers.retry_budget import RetryBudget as Budget


class RetryBudget:
    """What it refuses waits, and loses no attempt. An open breaker's probes are rationed already.

    It is asked before the limits are: room that is taken for a call which is then not made keeps
    others waiting that could go.
    """

    def __init__(self, budget: Budget, breakers: Breakers) -> None:
        self._budget = budget
        self._breakers = breakers

    async def __call__(self, run: Run) -> Run:
        # The route's own answer comes with its permit: nobody is called for it.
        if not run.is_retry or run.target is None or run.permit is not None:
            return run
        if self._breakers.of(run.target).is_open:
            return run
        wait = await self._budget.wait_of(run.target.provider)
        return run if wait is None else run.ended(Snoozed(wait, WaitReason.RETRY))
