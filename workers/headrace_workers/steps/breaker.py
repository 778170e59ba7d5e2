"""Leave to call: while the target's breaker is open, one probe of the fleet has it."""

from headrace_shared.errors import DispatchUnavailable
from headrace_shared.ids import hold_id
from headrace_shared.outcome import Snoozed, WaitReason
from headrace_workers.breaker import Breakers, NotNow, Permit
from headrace_workers.execution import Run
from headrace_workers.steps.hold import SERVER_PAUSE


class Breaker:
    def __init__(self, breakers: Breakers) -> None:
        self._breakers = breakers

    async def __call__(self, run: Run) -> Run:
        if run.target is None or run.permit is not None:
            return run
        try:
            permit = await self._breakers.of(run.target).admit(hold_id(run.job.id, run.job.run, run.call))
        except DispatchUnavailable:
            return run.ended(Snoozed(SERVER_PAUSE, WaitReason.SERVERS))
        match permit:
            case Permit():
                return run._replace(permit=permit)
            case NotNow(delay):
                return run.ended(Snoozed(delay, WaitReason.BREAKER))
