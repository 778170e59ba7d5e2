"""A producer process: asks for jobs at a steady rate, and writes down every promise it is given.

It is told what to do by one JSON object in `HEADRACE_CHAOS_PRODUCER`. A producer that was killed is
started again with the same orders: it asks once more for what it was not answered.
"""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict

from headrace_producer import Headrace, JobHandle
from headrace_producer.chaos import acks
from headrace_producer.chaos.acks import AckFile, Line
from headrace_producer.chaos.work import Tenants, Wish, keys_of, wish_of
from headrace_shared import logs
from headrace_shared.errors import HeadraceError, IdempotencyConflict, InvalidInput

VARIABLE = "HEADRACE_CHAOS_PRODUCER"
COMMAND = (sys.executable, "-P", "-m", "headrace_producer.chaos.load")

_ANSWER_SECONDS = 8.0
_PAUSE_SECONDS = 0.5
_LAST_SECONDS = 12.0
_MOST_UNANSWERED = 60

_occasionally = logs.Occasional(logging.getLogger(__name__))

_Answer = TypeVar("_Answer")


class Orders(BaseModel):
    """What one producer is to do."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True)

    seed: int
    producer: int
    run: str
    """The common beginning of the tenants' names."""
    canary: str
    """A word of every prompt."""
    asks_per_second: float
    acks: Path
    hooks: Mapping[str, str]
    """The webhook's URL of each tenant."""


class Producer:
    """Asks until it is told to stop; then it waits for its last answers."""

    def __init__(self, orders: Orders, client: Headrace) -> None:
        self._orders = orders
        self._tenants = Tenants.of(orders.run)
        self._client = client
        self._before = acks.read([orders.acks])
        self._file = AckFile(orders.acks)
        self._asks: set[asyncio.Task[None]] = set()
        self._stop = asyncio.Event()

    def stop(self) -> None:
        self._stop.set()

    async def run(self) -> None:
        """Ask, at the rate of the orders, for what comes next."""
        for key in self._before.unresolved:
            self._start([self._wish(key)])
        number = max(self._before.asked.values(), default=0)
        due = asyncio.get_running_loop().time()
        while not self._stop.is_set():
            number += 1
            self._ask(number)
            due += 1 / self._orders.asks_per_second
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), max(0.0, due - asyncio.get_running_loop().time()))
            while len(self._asks) >= _MOST_UNANSWERED and not self._stop.is_set():
                await asyncio.wait(self._asks, timeout=_PAUSE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                due = asyncio.get_running_loop().time()
        if self._asks:
            await asyncio.wait(self._asks, timeout=_LAST_SECONDS)

    def _wish(self, key: str) -> Wish:
        return wish_of(self._orders.seed, key, self._tenants, self._orders.canary)

    def _ask(self, number: int) -> None:
        wishes = [self._wish(key) for key in keys_of(self._orders.seed, self._orders.producer, number)]
        self._file.write(*(Line(key=wish.key, asked=number) for wish in wishes))
        self._start(wishes)

    def _start(self, wishes: Sequence[Wish]) -> None:
        for _ in range(wishes[0].callers):
            task = asyncio.create_task(self._until_answered(wishes))
            self._asks.add(task)
            task.add_done_callback(self._asks.discard)

    async def _until_answered(self, wishes: Sequence[Wish]) -> None:
        requests = [wish.request(self._orders.hooks) for wish in wishes]
        try:
            handles = await _insist(lambda: self._client.enqueue_many(requests))
        except (InvalidInput, IdempotencyConflict) as error:
            self._file.write(*(Line(key=wish.key, refused=str(error)) for wish in wishes))
            return
        pairs = list(zip(wishes, handles, strict=True))
        self._file.write(*(Line(key=wish.key, job=handle.id) for wish, handle in pairs))
        for wish, handle in pairs:
            if wish.cancel_after is not None:
                await self._cancel(wish, handle, wish.cancel_after)

    async def _cancel(self, wish: Wish, handle: JobHandle, after: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), after)
        changed = await _insist(handle.cancel)
        self._file.write(Line(key=wish.key, cancelled=changed))


async def _insist(ask: Callable[[], Awaitable[_Answer]]) -> _Answer:
    """Ask again and again until there is an answer: a key makes it safe, whatever became of the last ask."""
    while True:
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                return await ask()
        except (InvalidInput, IdempotencyConflict):
            raise
        except (HeadraceError, TimeoutError, OSError) as error:
            _occasionally.info("no answer: %s", type(error).__name__)
        await asyncio.sleep(_PAUSE_SECONDS)


async def _main(orders: Orders) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    while not stopped.is_set():
        try:
            async with Headrace() as client:
                producer = Producer(orders, client)
                stopping = asyncio.create_task(_when(stopped, producer.stop))
                await producer.run()
                stopping.cancel()
                return
        except (HeadraceError, OSError) as error:
            _occasionally.info("cannot begin: %s", error)
            await asyncio.sleep(_PAUSE_SECONDS)


async def _when(event: asyncio.Event, act: Callable[[], None]) -> None:
    await event.wait()
    act()


def main() -> None:
    logs.configure()
    asyncio.run(_main(Orders.model_validate_json(os.environ[VARIABLE])))


if __name__ == "__main__":
    main()
