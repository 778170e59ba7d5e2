"""The run of a job: one value through a visible list of named steps.

    guard -> handle -> share -> route -> hold -> retry_budget -> admit -> breaker -> journal -> lease
          -> call -> settle

Each step takes the run and returns it with what it found out. A step that ends the run
sets its `outcome`, and the steps after it are passed by; `settle` is never passed by: it
writes down what happened, whatever it was. A handler of an application's own does the job in
`handle`; its calls go the rest of the road by themselves. When settling says that the same worker tries
again at once, the run goes through the list another time, with its next call.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import NamedTuple

from headrace_shared.budgets import Held
from headrace_shared.errors import HeadraceError
from headrace_shared.ids import CallNumber, JobId, RouteName
from headrace_shared.ids import Run as RunNumber
from headrace_shared.job import ClaimedJob
from headrace_shared.outcome import (
    Cancelled,
    ErrorClass,
    Expired,
    Failed,
    Failure,
    Outcome,
    Snoozed,
    WaitReason,
)
from headrace_shared.policy import Timeouts
from headrace_shared.prices import Price
from headrace_shared.request import BoundsKnown, Endpoint, PreparedRequest
from headrace_shared.routes import Target
from headrace_workers.breaker import Permit
from headrace_workers.choosing import Met
from headrace_workers.limiting import Admission
from headrace_workers.replies import Reply

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ask:
    """What one call asks of a model."""

    endpoint: Endpoint
    route: RouteName
    body: bytes
    step: str | None = None
    """The name of a handler's call; None for a job that is a request itself."""
    digest: bytes | None = None
    """Of what a handler's call asks; with the name, a later run knows its answer by it."""
    bounds_known: BoundsKnown = field(default_factory=BoundsKnown, compare=False, repr=False)
    """How it is bounded, by vocabulary: its texts are counted once, whoever is asked."""


class Run(NamedTuple):
    """One claimed job on its way through the steps.

    A tuple and no dataclass: every step hands on a changed copy, and copying a dataclass is slow.
    """

    job: ClaimedJob
    call: CallNumber
    """The number of the call that is being prepared or made, from 1."""
    attempts: int
    """Attempts of the job that have failed by now."""
    ask: Ask | None = None
    """None where a handler of the application's own does the work."""
    is_retry: bool = False
    """A call of the job failed, and this one is made in its place; a fallback is none."""
    met: tuple[Met, ...] = ()
    """What earlier calls of this run met, at targets that are not called again for it."""
    bound_for: Target | None = None
    """Who is called, where that was settled when the call before failed."""
    last_resort: bytes | None = None
    """The route's own answer, where it is given instead of a call."""
    target: Target | None = None
    price: Price | None = None
    request: PreparedRequest | None = None
    downgraded: bool = False
    """A budget had no room for the call to the target that was chosen first."""
    timeouts: Timeouts | None = None
    """Of the call, where they are not its provider's own."""
    held: Held | None = None
    refused_under: int = 0
    """The epoch of the counters under which a budget has no room until its window turns."""
    admission: Admission | None = None
    permit: Permit | None = None
    journalled: bool = False
    """The call's intent may be in the store."""
    sent: bool = False
    """The request may have reached the provider."""
    reply: Reply | None = None
    output: bytes | None = None
    """What the handler returned, as JSON."""
    outcome: Outcome | None = None

    @classmethod
    def of(cls, job: ClaimedJob) -> "Run":
        ask = None
        if isinstance(job.endpoint, Endpoint):
            ask = Ask(job.endpoint, job.queue.route, job.body)
        return cls(job, CallNumber(1), job.attempts, ask, is_retry=job.attempts > 0)

    def again(
        self,
        attempts: int,
        *,
        is_retry: bool = False,
        met: tuple[Met, ...] = (),
        bound_for: Target | None = None,
        last_resort: bytes | None = None,
    ) -> "Run":
        """Return the same run at the start of its next call."""
        number = CallNumber(self.call + 1)
        return Run(self.job, number, attempts, self.ask, is_retry, met, bound_for, last_resort)

    def ended(self, outcome: Outcome) -> "Run":
        return self._replace(outcome=outcome)


@dataclass(frozen=True, slots=True)
class Again:
    """The same worker makes the run's next call after a short wait."""

    run: Run
    delay: timedelta


class LeavesIntent:
    """A step that may have written the call's intent although it did not come back."""


class Sends:
    """A step that may have sent the request although it did not come back."""


Step = Callable[[Run], Awaitable[Run]]
Settle = Callable[[Run], Awaitable[Again | Outcome]]


class Road:
    """The steps in their order, and `settle` after the last of them, whatever they came to."""

    def __init__(self, steps: Sequence[Step], settle: Settle) -> None:
        self._steps = steps
        self._settle = settle

    async def go(self, run: Run, interrupted: Callable[[], Outcome]) -> tuple[Run, Again | Outcome]:
        """Take a run through and settle it; return it with how it goes on, or how it ended.

        Args:
            run: with an outcome already, it is only settled.
            interrupted: says how the run ends when the task is cancelled during a step.

        """
        run = await self._take_through(run, interrupted)
        return run, await self._settled(run)

    async def _take_through(self, run: Run, interrupted: Callable[[], Outcome]) -> Run:
        for step in self._steps:
            if run.outcome is not None:
                break
            before = run
            try:
                run = await step(run)
            except asyncio.CancelledError:
                uncancel()
                return _mark(before, step).ended(interrupted())
            except Exception as error:
                _logger.exception("step %s failed", type(step).__name__, extra={"job_id": str(run.job.id)})
                return _mark(before, step).ended(_internal(error))
        return run

    async def _settled(self, run: Run) -> Again | Outcome:
        # What was found out is written down even when the task is cancelled meanwhile: the
        # answer is paid for. A reason to stop is looked at again after that.
        settling = asyncio.ensure_future(self._settle(run))
        while True:
            try:
                return await asyncio.shield(settling)
            except asyncio.CancelledError:
                uncancel()
                if settling.done():
                    return settling.result()


class Execution:
    """Takes claimed jobs through the steps, and knows why one is interrupted."""

    def __init__(self, steps: Sequence[Step], settle: Settle) -> None:
        self._road = Road(steps, settle)
        self._under_way: set[tuple[JobId, RunNumber]] = set()
        self._interruptions: dict[tuple[JobId, RunNumber], WaitReason | ErrorClass] = {}

    def interrupt(self, job: ClaimedJob, reason: WaitReason | ErrorClass, task: asyncio.Task[object]) -> None:
        """Cancel a job's task; its run then ends for this reason and no other."""
        self._interruptions.setdefault((job.id, job.run), reason)
        # A task that is cancelled before its first step could write nothing down: it looks here.
        if (job.id, job.run) in self._under_way:
            task.cancel()

    async def run(self, job: ClaimedJob) -> Outcome:
        """Run a job until it is ended or put back, and say which."""
        key = job.id, job.run
        self._under_way.add(key)
        try:
            settled = await self._go(Run.of(job))
            while isinstance(settled, Again):
                settled = await self._go(await self._wait(settled))
        finally:
            self._under_way.discard(key)
            self._interruptions.pop(key, None)
        return settled

    async def _wait(self, again: Again) -> Run:
        with contextlib.suppress(asyncio.CancelledError):
            if (again.run.job.id, again.run.job.run) not in self._interruptions:
                await asyncio.sleep(again.delay.total_seconds())
                return again.run
        uncancel()
        return again.run.ended(self._interrupted(again.run.job))

    async def _go(self, run: Run) -> Again | Outcome:
        if run.outcome is None and (run.job.id, run.job.run) in self._interruptions:
            uncancel()
            run = run.ended(self._interrupted(run.job))
        _, settled = await self._road.go(run, partial(self._interrupted, run.job))
        return settled

    def _interrupted(self, job: ClaimedJob) -> Outcome:
        match self._interruptions.pop((job.id, job.run), WaitReason.SHUTDOWN):
            case ErrorClass.CANCELLED:
                return Cancelled()
            case ErrorClass.EXPIRED:
                return Expired("its deadline or timeout passed while it ran")
            case WaitReason() as reason:
                return Snoozed(timedelta(0), reason)
            case reason:
                return Failed(Failure(reason, "the run was interrupted"))


def uncancel() -> None:
    """Take note of a cancellation that the present task does not pass on."""
    task = asyncio.current_task()
    if task is not None:
        task.uncancel()


def _mark(run: Run, step: Step) -> Run:
    """Assume the worst of a step that did not come back: its intent stands, its request is out."""
    return run._replace(
        journalled=run.journalled or isinstance(step, LeavesIntent),
        sent=run.sent or isinstance(step, Sends),
    )


def _internal(error: Exception) -> Failed:
    text = error.message if isinstance(error, HeadraceError) else type(error).__name__
    return Failed(Failure(ErrorClass.INTERNAL, text))
