"""The calls of one handler's run: each goes the road of a call, and ends nothing but itself.

A call that has to wait longer than a slot may be kept ends the handler's run instead: the job is
put back, and its next run finds in the journal what this one was answered.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from headrace_shared.ids import CallNumber
from headrace_shared.job import ClaimedJob
from headrace_shared.outcome import Cancelled, Failed, Failure, Outcome, Snoozed, Succeeded, WaitReason
from headrace_shared.store.checkpoints import Recalled
from headrace_workers.execution import Again, Ask, Road, Run
from headrace_workers.replies import Answered


@dataclass(frozen=True, slots=True)
class Rejected:
    """There will be no answer."""

    failure: Failure
    attempts: int
    """Of the job, were it for this call alone."""


@dataclass(frozen=True, slots=True)
class PutOff:
    """It cannot be made now, nor soon: the run has to end like this."""

    outcome: Outcome
    attempts: int
    """Of the job, before this outcome is counted."""


class Calls:
    """Makes the calls of one run.

    Args:
        road: the steps of a call, and what settles it.
        job: whose calls they are.
        slot_wait: how long one call may wait in its slot, all its waits together.

    """

    def __init__(self, road: Road, job: ClaimedJob, slot_wait: Callable[[], timedelta]) -> None:
        self._road = road
        self._job = job
        self._slot_wait = slot_wait
        self._number = 0
        self._under_way: set[asyncio.Task[Recalled | Rejected | PutOff]] = set()
        self.closing = False
        """No call begins, or begins anew, any more."""

    async def make(self, ask: Ask) -> Recalled | Rejected | PutOff:
        """Make a call, again if that is worth it, and say what it came to.

        The task that is cancelled in it goes on when the call is concluded: never sent, in
        suspense, or answered.
        """
        task = asyncio.create_task(self._make(ask), name=f"call-{self._job.id}")
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return await task

    async def until_concluded(self) -> None:
        """Wait for all calls that are under way."""
        while self._under_way:
            await asyncio.wait(self._under_way)

    def cancel(self) -> None:
        """Break off all calls; they are concluded after that."""
        for task in self._under_way:
            task.cancel()

    async def _make(self, ask: Ask) -> Recalled | Rejected | PutOff:
        number = self._next()
        # The first call that a later attempt does not find answered is the one that failed, or like it.
        is_retry = self._job.attempts > 0 and number == 1
        run = Run(self._job, number, self._job.attempts, ask, is_retry)
        snoozed = timedelta(0)
        while True:
            run, settled = await self._go(run)
            match settled:
                case Again(following, delay) if not self.closing:
                    pass
                # A refused intent may mean that the answer is there already: the next run knows.
                case Snoozed(delay, reason) if reason is not WaitReason.EPOCH and not self.closing:
                    snoozed += delay
                    if snoozed > self._slot_wait():
                        return PutOff(settled, run.attempts)
                    following = Run(self._job, run.call, run.attempts, ask, run.is_retry)
                case _:
                    return _concluded(run, settled)
            await asyncio.sleep(delay.total_seconds())
            run = following._replace(call=self._next())

    async def _go(self, run: Run) -> tuple[Run, Again | Outcome]:
        cancelled = False

        def interrupted() -> Outcome:
            nonlocal cancelled
            cancelled = True
            return Cancelled()

        run, settled = await self._road.go(run, interrupted)
        if cancelled:
            raise asyncio.CancelledError
        return run, settled

    def _next(self) -> CallNumber:
        self._number += 1
        return CallNumber(self._number)


def _concluded(run: Run, settled: Again | Outcome) -> Recalled | Rejected | PutOff:
    match settled:
        case Succeeded() if isinstance(run.reply, Answered) and run.target is not None:
            return Recalled(run.target.model, run.reply.body)
        case Failed(failure):
            return Rejected(failure, run.attempts)
        case Again():
            return PutOff(Snoozed(timedelta(0), WaitReason.RETRY), run.attempts)
        case outcome:
            return PutOff(outcome, run.attempts)
