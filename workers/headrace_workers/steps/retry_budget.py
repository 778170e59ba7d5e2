"""A call that is made again goes out only while the fleet's retries are few beside its successes."""

from headrace_shared.outcome import Snoozed, WaitReason
from headrace_workers.execution import Run
from headrace_workers.retry_budget import RetryBudget as Budget


class RetryBudget:
    """What it refuses waits, and loses no attempt. A breaker's probe is rationed already."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget

    async def __call__(self, run: Run) -> Run:
        if not run.is_retry or run.target is None or run.permit is None or run.permit.owner is not None:
            return run
        wait = await self._budget.wait_of(run.target.provider)
        return run if wait is None else run.ended(Snoozed(wait, WaitReason.RETRY))
