"""Calls for the end of the process, made in a handler: they end the handler alone.

An event loop passes `SystemExit` and `KeyboardInterrupt` on to whoever runs it, out of whatever task
they are raised in. A handler's would end the worker, and the next one that takes the job as well.
"""

import asyncio
from collections.abc import Coroutine, Generator
from contextvars import Context, ContextVar
from typing import TypedDict, TypeVar, Unpack

T = TypeVar("T")

_contained = ContextVar("exits_are_contained", default=False)


class Exited(Exception):
    """A handler called for the end of the process."""


def contain_exits() -> None:
    """Let such calls fail the tasks that the present one makes from now on, and theirs.

    A loop that has a task factory already, an application's own, keeps it: there they end the process.
    """
    _contained.set(True)
    loop = asyncio.get_running_loop()
    if loop.get_task_factory() is None:
        loop.set_task_factory(_make)


class _Options(TypedDict, total=False):
    name: str | None
    context: Context | None


def _make(
    loop: asyncio.AbstractEventLoop,
    coroutine: Coroutine[object, object, T] | Generator[asyncio.Future[object] | None, None, T],
    /,
    **options: Unpack[_Options],
) -> asyncio.Future[T]:
    if not _contained.get() or not isinstance(coroutine, Coroutine):
        return asyncio.Task(coroutine, loop=loop, **options)
    task = asyncio.Task(_contain(coroutine), loop=loop, **options)
    # One that is cancelled before it began never gets to what it holds.
    task.add_done_callback(lambda _: coroutine.close())
    return task


async def _contain(coroutine: Coroutine[object, object, T]) -> T:
    try:
        return await coroutine
    except (SystemExit, KeyboardInterrupt) as error:
        raise Exited(type(error).__name__) from error
