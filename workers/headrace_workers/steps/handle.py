"""A handler of the application's own does the job, and may make calls and checkpoints in it."""

import asyncio
import inspect
import logging
import time
from datetime import timedelta
from typing import TypeGuard, TypeVar

from pydantic import BaseModel, ValidationError

from headrace_shared.errors import HeadraceError, InvalidInput
from headrace_shared.jsonvalue import storable
from headrace_shared.outcome import ErrorClass, Failed, Failure, Outcome, Snoozed, Succeeded, WaitReason
from headrace_shared.store.checkpoints import EMPTY, Journal, recall
from headrace_shared.store.pool import UNREACHABLE, Pool
from headrace_shared.validation import first_problem
from headrace_workers.configured import Configured
from headrace_workers.execution import Road, Run, uncancel
from headrace_workers.handlers.calls import Calls
from headrace_workers.handlers.context import Context, FailedCall
from headrace_workers.handlers.exits import Exited, contain_exits
from headrace_workers.handlers.loading import Handlers
from headrace_workers.handlers.notes import Notes
from headrace_workers.handlers.registry import Handler
from headrace_workers.handlers.values import encode_result
from headrace_workers.retrying import decide
from headrace_workers.steps.hold import SERVER_PAUSE

_logger = logging.getLogger(__name__)

GRACE = timedelta(seconds=5)
"""How long a handler that is cancelled may take to end, before its slot is given to others."""

_UNKNOWN_PAUSE = timedelta(seconds=5)
_MESSAGE_LENGTH = 500

W = TypeVar("W")


class Handle:
    """Runs the handler of a job; a job that is a request itself passes by.

    Args:
        road: the steps of a call, for those that the handler makes.

    """

    def __init__(self, handlers: Handlers, road: Road, pool: Pool, configured: Configured) -> None:
        self._handlers = handlers
        self._road = road
        self._pool = pool
        self._configured = configured
        self._abandoned: set[asyncio.Task[object]] = set()

    async def __call__(self, run: Run) -> Run:
        if run.ask is not None:
            return run
        handler = self._handlers.of(run.job.endpoint)
        if handler is None:
            return run.ended(Snoozed(_UNKNOWN_PAUSE, WaitReason.WORKER))
        try:
            given = handler.input.model_validate_json(run.job.body)
        except ValidationError as error:
            reason = f"its input is no {handler.input.__name__}: {first_problem(error)}"
            return run.ended(Failed(_failure(reason)))
        try:
            journal = EMPTY if run.job.run == 1 else await recall(self._pool, run.job.id, run.job.run)
        except UNREACHABLE:
            return run.ended(Snoozed(SERVER_PAUSE, WaitReason.SERVERS))
        return await self._perform(run, handler, given, journal)

    async def _perform(self, run: Run, handler: Handler, given: BaseModel, journal: Journal) -> Run:
        calls = Calls(self._road, run.job, lambda: self._configured.now.retries.slot_wait)
        notes = Notes(self._pool, run.job)
        context = Context(run.job, journal, calls, notes, self._configured)
        task = asyncio.create_task(self._invoke(handler, context, given), name=f"handler-{run.job.id}")
        try:
            timed_out = not await self._until_over(task, context, handler.timeout)
            context.close()
            if not task.done():
                await self._stop(task, calls, handler, run)
            # Calls that the handler left behind are paid for.
            await calls.until_concluded()
            if _is_to_be_repeated(task):
                await context.until_steps_over()
        except asyncio.CancelledError:
            context.close()
            await self._stop(task, calls, handler, run)
            raise
        finally:
            await notes.close()
        if timed_out:
            message = f"handler {handler.name} took longer than {handler.timeout}"
            return run.ended(self._decide(run, Failure(ErrorClass.TIMEOUT, message)))
        return self._judged(run, handler, context, task)

    async def _until_over(
        self, task: asyncio.Task[object], context: Context, timeout: timedelta | None
    ) -> bool:
        """Wait until the handler has ended, or has to; false when its time is over."""
        unwound = asyncio.create_task(context.unwound.wait(), name="unwound")
        try:
            seconds = None if timeout is None else timeout.total_seconds()
            done, _ = await asyncio.wait(
                (task, unwound), timeout=seconds, return_when=asyncio.FIRST_COMPLETED
            )
            if unwound in done and not task.done():
                await asyncio.wait((task,), timeout=GRACE.total_seconds())
            return bool(done)
        finally:
            unwound.cancel()

    async def _invoke(self, handler: Handler, context: Context, given: BaseModel) -> object:
        contain_exits()
        try:
            return await handler.function(context, given, **self._handlers.given[handler.name])
        except (SystemExit, KeyboardInterrupt) as error:
            # It would end the worker, and with it everybody's jobs.
            raise Exited(type(error).__name__) from error

    async def _stop(self, task: asyncio.Task[object], calls: Calls, handler: Handler, run: Run) -> None:
        """Cancel a handler; its calls are concluded, and it is waited for, but not for ever."""
        task.cancel()
        calls.cancel()
        await _until(asyncio.ensure_future(calls.until_concluded()))
        ending = time.monotonic() + GRACE.total_seconds()
        while not task.done() and (left := ending - time.monotonic()) > 0:
            await _until(asyncio.ensure_future(asyncio.wait((task,), timeout=left)))
        if task.done():
            if not task.cancelled():
                task.exception()
            return
        _logger.error(
            "handler %s ignores that it was cancelled (at %s): its run is over, its slot is given to others, "
            "and nothing that it does with its context counts",
            handler.name,
            _place(task),
            extra={"job_id": str(run.job.id)},
        )
        self._abandoned.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[object]) -> None:
        self._abandoned.discard(task)
        if not task.cancelled():
            task.exception()

    def _judged(self, run: Run, handler: Handler, context: Context, task: asyncio.Task[object]) -> Run:
        if context.put_off is not None:
            return run._replace(attempts=context.put_off.attempts, outcome=context.put_off.outcome)
        if task.cancelled():
            return run.ended(self._decide(run, _failure(f"handler {handler.name} cancelled itself")))
        error = task.exception()
        if error is None:
            return self._returned(run, handler, task.result())
        if (failed := _failed_call(error)) is not None:
            return run._replace(attempts=failed.attempts, outcome=Failed(failed.failure))
        failure = _failure(f"{type(error).__name__}: {error}")
        _logger.warning(
            "handler %s raised %s", handler.name, type(error).__name__, extra={"job_id": str(run.job.id)}
        )
        # What Headrace itself refused, it refuses again.
        return run.ended(Failed(failure) if isinstance(error, InvalidInput) else self._decide(run, failure))

    def _returned(self, run: Run, handler: Handler, value: object) -> Run:
        limit = self._configured.now.configuration.defaults.max_body_bytes
        try:
            output = encode_result(handler.output, value, limit=limit)
        except HeadraceError as error:
            return run.ended(Failed(_failure(error.message)))
        return run._replace(output=output, outcome=Succeeded())

    def _decide(self, run: Run, failure: Failure) -> Outcome:
        return decide(
            self._configured.now.retries,
            failure,
            attempts=run.attempts + 1,
            max_attempts=run.job.max_attempts,
        )


def _is_to_be_repeated(task: asyncio.Task[object]) -> bool:
    """Whether a handler ended of its own accord, and without a result."""
    return task.done() and not task.cancelled() and task.exception() is not None


def _failure(text: str) -> Failure:
    return Failure(ErrorClass.HANDLER, storable(text)[:_MESSAGE_LENGTH])


def _failed_call(error: BaseException) -> FailedCall | None:
    """Return the call that failed, if a handler was ended by nothing else."""
    if _is_group(error):
        found = [_failed_call(one) for one in error.exceptions]
        return None if None in found else found[0]
    return error if isinstance(error, FailedCall) else None


def _is_group(error: BaseException) -> TypeGuard[BaseExceptionGroup[BaseException]]:
    return isinstance(error, BaseExceptionGroup)


async def _until(waiting: asyncio.Future[W]) -> None:
    """Wait for something, whoever cancels the present task meanwhile: it is cancelled already."""
    while not waiting.done():
        try:
            await asyncio.shield(waiting)
        except asyncio.CancelledError:
            uncancel()


def _place(task: asyncio.Task[object]) -> str:
    invoked = task.get_coro()
    own = invoked.cr_await if inspect.iscoroutine(invoked) else None
    frame = own.cr_frame if inspect.iscoroutine(own) else None
    return "an unknown place" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"
