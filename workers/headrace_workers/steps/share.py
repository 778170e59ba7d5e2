"""Of identical requests in flight one is sent; the others wait for its answer, without slot or money."""

from collections.abc import Sequence
from datetime import timedelta

from headrace_shared.batching import Batcher
from headrace_shared.outcome import Snoozed, WaitReason
from headrace_shared.store import flights
from headrace_shared.store.flights import Passenger
from headrace_shared.store.pool import UNREACHABLE, Pool
from headrace_workers.execution import Run
from headrace_workers.steps.hold import SERVER_PAUSE

_LOOK_AGAIN = timedelta(seconds=30)
"""When a follower asks again that nobody ended or woke: its flight was not landed, or Redis lost the word."""


class Share:
    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._joining = Batcher[Passenger, bool](self._join, max_size=500)

    async def __call__(self, run: Run) -> Run:
        if run.job.flight is None or run.call > 1:
            return run
        passenger = Passenger(run.job.id, run.job.run, run.job.queue.tenant, run.job.flight)
        try:
            follows = await self._joining.submit(passenger)
        except UNREACHABLE:
            return run.ended(Snoozed(SERVER_PAUSE, WaitReason.SERVERS))
        return run.ended(Snoozed(_LOOK_AGAIN, WaitReason.FLIGHT)) if follows else run

    async def _join(self, passengers: Sequence[Passenger]) -> Sequence[bool]:
        follow = await flights.join(self._pool, passengers)
        return [passenger.job_id in follow for passenger in passengers]
