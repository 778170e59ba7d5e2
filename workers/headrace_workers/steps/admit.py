"""Room under the provider's limits: the call goes at its moment, or its job waits for it without a slot."""

from headrace_shared.dispatch.limits import Wait
from headrace_shared.ids import hold_id
from headrace_shared.outcome import Snoozed, WaitReason
from headrace_workers.execution import Run
from headrace_workers.limiting import Limiter


class Admit:
    def __init__(self, limiter: Limiter) -> None:
        self._limiter = limiter

    async def __call__(self, run: Run) -> Run:
        if run.target is None or run.request is None:
            return run
        call = hold_id(run.job.id, run.job.run, run.call)
        bounds = run.request.input_bound, run.request.output_bound
        admission = await self._limiter.admit(call, run.target, *bounds)
        if isinstance(admission, Wait):
            return run.ended(Snoozed(admission.delay, WaitReason.LIMIT))
        return run._replace(admission=admission)
