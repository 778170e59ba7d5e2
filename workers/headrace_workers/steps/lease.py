"""Nothing is sent for a run that may have lost its row meanwhile."""

from headrace_workers.execution import Run
from headrace_workers.leases import Leases


class Lease:
    """Between the intent and the call, a process can stand still for longer than its leases.

    The intent says that the row was the run's when it was written; who went on from there
    would pay for a call that somebody else makes as well.
    """

    def __init__(self, leases: Leases) -> None:
        self._leases = leases

    async def __call__(self, run: Run) -> Run:
        if not self._leases.are_certain(run.job):
            await self._leases.become_certain(run.job)
        return run
