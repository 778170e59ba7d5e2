"""Keeps the windows in Redis filled from Postgres: what is due and is not there, gets there.

It is also the relay: ids whose push was lost, jobs that a caller's own transaction
inserted, retries, and everything after Redis lost its memory, all of them are rows that
are due and not in a window.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable
from datetime import timedelta

from headrace_shared.dispatch import keys
from headrace_shared.dispatch.dispatch import WINDOW, Dispatch, Entry
from headrace_shared.errors import DispatchUnavailable, StoreUnavailable
from headrace_shared.job import Queue
from headrace_shared.store import feed
from headrace_shared.store.pool import UNREACHABLE, Connection, Pool, connect

_logger = logging.getLogger(__name__)

INTERVAL = timedelta(seconds=1)
"""Between two looks at the store when nothing rings."""

_MAX_REST = timedelta(seconds=5)
_DUTY = 20
"""A look that takes long is followed by a pause of this many times as long, at least."""


class Feeder:
    """Fills windows; one process of the fleet at a time does it."""

    def __init__(
        self, pool: Pool, dispatch: Dispatch, *, listen_url: str | None, window: int = WINDOW
    ) -> None:
        self._pool = pool
        self._dispatch = dispatch
        self._listen_url = listen_url
        self._window = window
        self._rung = asyncio.Event()

    async def turn(self) -> timedelta:
        """Look once through all queues that have a job due; return how long to rest."""
        began = time.monotonic()
        queues = await feed.due_queues(self._pool)
        due = await self._dispatch.due(queues)
        for queue, present in zip(queues, due, strict=True):
            if present < self._window / 2:
                await self._feed(queue)
        took = timedelta(seconds=time.monotonic() - began)
        return min(max(INTERVAL, _DUTY * took), _MAX_REST) if len(queues) > 1 else INTERVAL

    async def _feed(self, queue: Queue) -> None:
        # The head of the queue is what its window should hold; ids that are there already,
        # due or leased, are left alone. Some more than fit, because a few of the head are leased
        # and not yet running: what has no room says that the queue is deep.
        ids = await feed.due_jobs(self._pool, queue, limit=self._window * 5 // 4 + 1)
        await self._dispatch.push([(Entry(queue, job_id), timedelta(0)) for job_id in ids])

    async def wake(self, rest: timedelta) -> None:
        """Rest, but not once somebody rings: a hungry window, or a commit that notified."""
        async with _cancelled_on_exit(
            asyncio.create_task(self._rung.wait(), name="feeder-notified"),
            asyncio.create_task(
                self._dispatch.redis.wait_for([keys.FEEDER_BELL], rest.total_seconds()), name="feeder-bell"
            ),
        ) as waits:
            done, _ = await asyncio.wait(
                waits, timeout=rest.total_seconds(), return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                task.result()
        self._rung.clear()

    async def listen(self) -> None:
        """Hear NOTIFY until cancelled; where it cannot pass, the feeder's own look is enough."""
        while self._listen_url is not None:
            with contextlib.suppress(StoreUnavailable, *UNREACHABLE):
                connection = await connect(self._listen_url)
                await self._hear(connection)
            await asyncio.sleep(1)

    async def _hear(self, connection: Connection) -> None:
        closed = asyncio.Event()
        try:
            connection.add_termination_listener(_setter(closed))
            await connection.add_listener("headrace", _setter(self._rung))
            await closed.wait()
        finally:
            await connection.close(timeout=1)


def _setter(event: asyncio.Event) -> Callable[..., None]:
    def ring(*_message: object) -> None:
        event.set()

    return ring


@contextlib.asynccontextmanager
async def _cancelled_on_exit(*tasks: asyncio.Task[bool]) -> AsyncGenerator[tuple[asyncio.Task[bool], ...]]:
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        with contextlib.suppress(DispatchUnavailable):
            await asyncio.gather(*tasks, return_exceptions=True)
