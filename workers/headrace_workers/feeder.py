"""Keeps the windows in Redis filled from Postgres: what is due and is not there, gets there.

It is also the relay: ids whose push was lost, jobs that a caller's own transaction
inserted, retries, and everything after Redis lost its memory, all of them are rows that
are due and not in a window. A Redis that was wiped, replaced or taken back to an old snapshot is
told by `keys.FED`: claims ring, and the feeder begins with empty queues, so that no window is full
of ids whose jobs ended long ago.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from datetime import timedelta

from headrace_shared.configuration import LONGEST_LEASE
from headrace_shared.dispatch import keys
from headrace_shared.dispatch.dispatch import WINDOW, Dispatch, Entry
from headrace_shared.errors import DispatchUnavailable, StoreUnavailable
from headrace_shared.job import Queue
from headrace_shared.pauses import Pauses
from headrace_shared.store import feed
from headrace_shared.store.pool import UNREACHABLE, Connection, Pool, connect

_logger = logging.getLogger(__name__)

INTERVAL = timedelta(seconds=1)
"""Between two looks at the store when nothing rings."""

_NO_DELAY = timedelta(0)
_MAX_REST = timedelta(seconds=5)
_DUTY = 20
"""A look that takes long and finds nothing to do is followed by a pause of this many times as long."""

_PAGE = 10
_HEAD = 500
"""Heads of so many queues, of so many jobs each, are moved in one go: it takes a moment only, and
hundreds of queues resume together. What is longer is moved by itself."""


class Feeder:
    """Fills windows; one process of the fleet at a time does it."""

    def __init__(
        self,
        pool: Pool,
        dispatch: Dispatch,
        *,
        listen_url: str | None,
        longest_lease: Callable[[], timedelta] = lambda: LONGEST_LEASE,
        window: int = WINDOW,
    ) -> None:
        self._pool = pool
        self._dispatch = dispatch
        self._pauses = Pauses(pool, dispatch)
        self._listen_url = listen_url
        self._longest_lease = longest_lease
        self._window = window
        self._rung = asyncio.Event()

    async def turn(self) -> timedelta:
        """Look once through all queues that have a job due; return how long to rest."""
        began = time.monotonic()
        if not await self._dispatch.is_fed():
            if await feed.has_jobs(self._pool):
                _logger.warning(
                    "the dispatch is new, was wiped, or is an old copy: its queues are filled anew"
                )
            else:
                _logger.info("the dispatch is new, and there are no jobs yet")
            await self._begin_afresh()
        # Before any queue is filled whose jobs are to stay in it.
        await self._pauses.put_in_place()
        queues = await feed.due_queues(self._pool)
        due = await self._dispatch.due(queues)
        short = [queue for queue, present in zip(queues, due, strict=True) if present < self._window / 2]
        fed = await self._feed(short)
        took = timedelta(seconds=time.monotonic() - began)
        return INTERVAL if fed or len(queues) <= 1 else min(max(INTERVAL, _DUTY * took), _MAX_REST)

    async def _begin_afresh(self) -> None:
        # What runs is counted before anything is claimed that a cap allows only because of the loss.
        running = await feed.running_jobs(self._pool)
        await self._dispatch.begin_afresh(running)
        # What ended between the readings was leased for nobody: whoever claims it now sees what its row says.
        still = {entry for entry, _ in await feed.running_jobs(self._pool)}
        await self._dispatch.finish([(entry, _NO_DELAY) for entry, _ in running if entry not in still])

    async def _feed(self, queues: Sequence[Queue]) -> bool:
        """Fill windows; say whether a queue may hold more than was moved."""
        # The head of a queue is what its window should hold; some more than fit, because a few of the
        # head are leased and not yet running: what has no room says that the queue is deep.
        whole = self._window * 5 // 4 + 1
        part = min(_HEAD, whole)
        long: list[Queue] = []
        for start in range(0, len(queues), _PAGE):
            page = queues[start : start + _PAGE]
            heads = await self._move(page, limit=part)
            long += [queue for queue, moved in zip(page, heads, strict=True) if moved == part]
        if part == whole:
            return bool(long)
        moved = [await self._move([queue], limit=whole) for queue in long]
        return [whole] in moved

    async def _move(self, queues: Sequence[Queue], *, limit: int) -> list[int]:
        """Push the heads of queues, in one statement and one round trip; return how long they were."""
        heads = await feed.due_jobs(self._pool, queues, limit=limit)
        entries = [
            (Entry(queue, job_id), _NO_DELAY)
            for queue, head in zip(queues, heads, strict=True)
            for job_id in head
        ]
        # Ids that are there already, due or leased, are left alone, unless they come due later than
        # any lease: such a time is not a lease but a mistake (the row was made due earlier, and the
        # push that said so was lost), for the row says that the job is due. What ends within a lease
        # cannot be told from one that was claimed here and is not yet in its row; it comes by itself.
        # Were one shortened all the same (a worker has a longer lease than this process knows of),
        # the id would be claimed twice and its row once.
        await self._dispatch.push(entries, pull_beyond=self._longest_lease())
        return [len(head) for head in heads]

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
