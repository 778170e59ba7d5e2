"""Bells that ring when jobs have ended: at once where Redis says so, else when Postgres was asked."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from uuid import UUID

from headrace_shared.dispatch import keys
from headrace_shared.dispatch.connection import Listener, Redis
from headrace_shared.errors import DispatchError
from headrace_shared.ids import JobId
from headrace_shared.store import claims
from headrace_shared.store.claims import Standing
from headrace_shared.store.pool import UNREACHABLE, Pool

_LISTEN_SECONDS = 60.0
_RECONNECT_SECONDS = 1.0
_CANCEL_AGAIN_SECONDS = 0.1
_POLL_SECONDS = 5.0
"""While Redis tells: so long does a message take at most that was lost."""
_POLL_SECONDS_WITHOUT_REDIS = 0.5

_logger = logging.getLogger(__name__)


class Bells:
    """All bells of a client: one connection hears Redis for them, one statement asks Postgres."""

    def __init__(self, pool: Pool, redis: Redis) -> None:
        self._pool = pool
        self._redis = redis
        self._bells: dict[JobId, set[asyncio.Event]] = {}
        self._listener: Listener | None = None
        self._ask_now = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def close(self) -> None:
        # More than once: redis-py sends under asyncio.wait_for, which may lose a cancellation before
        # Python 3.12.
        while running := [task for task in self._tasks if not task.done()]:
            for task in running:
                task.cancel()
            await asyncio.wait(running, timeout=_CANCEL_AGAIN_SECONDS)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @asynccontextmanager
    async def bell(self, job_id: JobId) -> AsyncGenerator[asyncio.Event]:
        """An event that is set when the job may have ended; its row is to be read after this began."""
        bell = asyncio.Event()
        self._bells.setdefault(job_id, set()).add(bell)
        if not self._tasks:
            self._tasks = [
                asyncio.create_task(self._hear(), name="headrace-hear-endings"),
                asyncio.create_task(self._ask(), name="headrace-ask-for-endings"),
            ]
        try:
            if self._listener is not None:
                with suppress(DispatchError):
                    await self._listener.subscribe(keys.ended(job_id))
            yield bell
        finally:
            await self._forget(job_id, bell)

    async def _forget(self, job_id: JobId, bell: asyncio.Event) -> None:
        others = self._bells[job_id]
        others.discard(bell)
        if others:
            return
        del self._bells[job_id]
        if self._listener is not None:
            with suppress(DispatchError):
                await self._listener.unsubscribe(keys.ended(job_id))

    async def _hear(self) -> None:
        told = False
        while True:
            try:
                async with self._redis.listener() as listener:
                    # A channel that stays: the connection is made here, before others use it.
                    await listener.subscribe(keys.ENDED)
                    self._listener, told = listener, False
                    for job_id in list(self._bells):
                        await listener.subscribe(keys.ended(job_id))
                    self._ask_now.set()
                    while True:
                        self._ring(await listener.next(_LISTEN_SECONDS))
            except DispatchError as error:
                if not told:
                    _logger.warning("Redis tells of no endings, Postgres is asked instead: %s", error)
                    told = True
            finally:
                self._listener = None
            self._ask_now.set()
            await asyncio.sleep(_RECONNECT_SECONDS)

    def _ring(self, channel: str | None) -> None:
        if channel is not None:
            with suppress(ValueError):
                self._set(JobId(UUID(channel.removeprefix(keys.ENDED))))

    async def _ask(self) -> None:
        while True:
            patience = _POLL_SECONDS if self._listener else _POLL_SECONDS_WITHOUT_REDIS
            with suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await self._ask_now.wait()
            self._ask_now.clear()
            asked = list(self._bells)
            with suppress(*UNREACHABLE):
                found = await claims.look_up(self._pool, asked) if asked else []
                under_way = {one.id for one in found if one.standing is not Standing.ENDED}
                for job_id in set(asked) - under_way:
                    self._set(job_id)

    def _set(self, job_id: JobId) -> None:
        for bell in self._bells.get(job_id, ()):
            bell.set()
