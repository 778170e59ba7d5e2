"""What a handler is given to work with: calls, steps and progress of its job."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from typing import NoReturn, ParamSpec, TypeVar

from headrace_shared.errors import CallFailed, InvalidRequest
from headrace_shared.ids import JobId, RouteName, Run, Tenant
from headrace_shared.job import ClaimedJob
from headrace_shared.jsonvalue import storable
from headrace_shared.outcome import Failure, Snoozed, WaitReason
from headrace_shared.request import check_request
from headrace_shared.store.checkpoints import Journal
from headrace_workers.configured import Configured
from headrace_workers.execution import Ask
from headrace_workers.handlers.answers import Answer
from headrace_workers.handlers.calls import Calls, PutOff, Rejected
from headrace_workers.handlers.notes import Notes
from headrace_workers.handlers.steps import Steps
from headrace_workers.handlers.unnamed import MARK, Unnamed
from headrace_workers.handlers.values import adapter_of, decode, encode

P = ParamSpec("P")
T = TypeVar("T")

MAX_NAME_LENGTH = 128
MAX_NOTE_LENGTH = 200


class Unwound(BaseException):
    """The run is over, and its handler with it: not an error, and not to be held up.

    It is no `Exception`, so that a handler's `except Exception` lets it pass. What a handler that
    holds it up does after it, or returns, counts for nothing.
    """


class FailedCall(CallFailed):
    def __init__(self, *, name: str, failure: Failure, attempts: int) -> None:
        super().__init__(name=name, error_class=failure.error_class, error=failure.message)
        self.failure = failure
        self.attempts = attempts


class Context:
    """One run of a handler, as the handler sees it. It is made by the worker alone."""

    def __init__(
        self, job: ClaimedJob, journal: Journal, calls: Calls, notes: Notes, configured: Configured
    ) -> None:
        self._job = job
        self._journal = journal
        self._calls = calls
        self._notes = notes
        self._configured = configured
        self._names: set[str] = set()
        self._unnamed = Unnamed(journal.calls)
        self._steps = Steps()
        self.put_off: PutOff | None = None
        """How the run must end, whatever the handler does."""
        self.unwound = asyncio.Event()
        """The handler was told that the run is over."""

    @property
    def job_id(self) -> JobId:
        return self._job.id

    @property
    def run(self) -> Run:
        """Which claim of the job this is, from 1; redeliveries after a crash or a wait count."""
        return self._job.run

    @property
    def attempt(self) -> int:
        """The attempts that failed before, and this one; a crash or a wait is none."""
        return self._job.attempts + 1

    @property
    def tenant(self) -> Tenant:
        return self._job.queue.tenant

    @property
    def metadata(self) -> Mapping[str, str]:
        return self._job.metadata

    async def llm(
        self, endpoint: str, body: Mapping[str, object] | bytes | str, *, name: str | None = None
    ) -> Answer:
        """Call a model under the job's budget, limits and breaker; never pay for one answer twice.

        An answer that an earlier run of the job was given for the same request is returned as it
        is. Without a name, equal requests of a run are given the answers to such, in their order.

        Args:
            endpoint: a path of the provider's API, such as `/v1/chat/completions`.
            body: the request in the provider's wire format, as a job's.
            name: what the call is, in this handler; unique within a run.

        Raises:
            InvalidRequest: names the field and what is wrong with it.
            CallFailed: there is no answer, and another attempt would come to none.

        """
        await self._check_going_on()
        most = self._configured.now.configuration.defaults.max_body_bytes
        checked = check_request(endpoint, body, max_body_bytes=most)
        step = self._unnamed.take(checked.digest) if name is None else self._take_name(name)
        known = self._journal.calls.get((step, checked.digest))
        if known is not None:
            return Answer(known.answer, known.model, replayed=True)
        ask = Ask(checked.endpoint, RouteName(checked.model), checked.body, step, checked.digest)
        answered = await self._calls.make(ask)
        if isinstance(answered, PutOff):
            await self._leave(answered)
        # A cancellation that came while the answer was written down is not lost.
        await self._check_going_on()
        if isinstance(answered, Rejected):
            raise FailedCall(name=step, failure=answered.failure, attempts=answered.attempts)
        return Answer(answered.answer, answered.model, replayed=False)

    async def step(
        self, name: str, function: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Do something once in all runs of the job, and keep what it came to.

        What is returned has been written as JSON and read again, in the first run as in later
        ones, as what the function's result is annotated as.

        Args:
            name: what it is, in this handler; unique within a run.
            function: what does it; a worker that dies in it leaves it to be done again.
            args: for the function.
            kwargs: for the function.

        Raises:
            InvalidRequest: the name was used before, or the result cannot be kept as JSON.

        """
        await self._check_going_on()
        taken = self._take_name(name)
        adapter = adapter_of(function)
        known = self._journal.steps.get(taken)
        if known is not None:
            return decode(adapter, known)
        limit = self._configured.now.configuration.defaults.max_body_bytes
        try:
            with self._steps.one():
                done = encode(adapter, await function(*args, **kwargs), limit=limit)
                result = decode(adapter, done)
                # Before anything asks whether the run is over: what is done is done, and the store
                # refuses it from a run that has lost its row.
                kept = await self._notes.keep(taken, done)
        except Unwound:
            await self._unwind()
        if not kept:
            await self._leave(PutOff(Snoozed(timedelta(0), WaitReason.LOST_LEASE), self._job.attempts))
        await self._check_going_on()
        return result

    async def progress(self, share: float, note: str | None = None) -> None:
        """Say how far the job is; what is said too often is left out, but not the last of it.

        Args:
            share: from 0 to 1.
            note: a few words, of 200 characters at most.

        Raises:
            InvalidRequest: the share is none.

        """
        await self._check_going_on()
        if not math.isfinite(share) or not 0 <= share <= 1:
            raise InvalidRequest(field="progress", reason="must be from 0 to 1")
        self._notes.tell(float(share), None if note is None else storable(note[:MAX_NOTE_LENGTH]))

    async def until_steps_over(self) -> None:
        """Wait for the steps that the handler left behind."""
        await self._steps.until_over()

    def close(self) -> None:
        """Let nothing begin any more: whatever is called on this context is unwound."""
        self._calls.closing = True

    async def _check_going_on(self) -> None:
        if self._calls.closing:
            await self._unwind()

    async def _leave(self, put_off: PutOff) -> NoReturn:
        self.put_off = self.put_off or put_off
        self.close()
        await self._unwind()

    async def _unwind(self) -> NoReturn:
        # A task group breaks off the siblings of the call that unwinds: what they are being
        # answered would be paid for twice, what they do would be done twice.
        await self._calls.until_concluded()
        await self._steps.until_over()
        self.unwound.set()
        raise Unwound

    def _take_name(self, name: str) -> str:
        if not 1 <= len(name) <= MAX_NAME_LENGTH or not name.isprintable() or name.startswith(MARK):
            reason = f"must be 1 to {MAX_NAME_LENGTH} printable characters, the first not {MARK}"
            raise InvalidRequest(field="name", reason=reason)
        if name in self._names:
            raise InvalidRequest(field="name", reason=f"{name!r} is used twice in one run")
        self._names.add(name)
        return name
