"""Many callers, one round trip.

Whoever submits while a flush is under way waits for the next one, so that a batch is as
large as the load makes it and an idle caller waits for nobody.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from typing import Generic, TypeVar

In = TypeVar("In")
Out = TypeVar("Out")


class Batcher(Generic[In, Out]):
    """Gather items that are submitted close together and hand them to one `flush`.

    Args:
        flush: turns a batch into as many results, in order.
        max_size: items in one batch at most.
        max_weight: what the items of one batch may weigh together; a heavier one goes alone.
        weigh: what an item weighs.
        max_delay: how long a first item may wait for company.
        company: whether more than this many items can be expected soon; without company nothing waits.
        halve_on: errors that one item can cause for its whole batch. Such a batch is halved
            until the item stands alone and fails by itself.
        unclaimed: told of an item and its result whose submitter was cancelled meanwhile.

    """

    def __init__(
        self,
        flush: Callable[[Sequence[In]], Awaitable[Sequence[Out]]],
        *,
        max_size: int = 500,
        max_weight: int = 1,
        weigh: Callable[[In], int] = lambda _item: 0,
        max_delay: timedelta = timedelta(0),
        company: Callable[[int], bool] = lambda _pending: True,
        halve_on: tuple[type[Exception], ...] = (),
        unclaimed: Callable[[In, Out], None] = lambda _item, _result: None,
    ) -> None:
        self._flush = flush
        self._max_size = max_size
        self._max_weight = max_weight
        self._weigh = weigh
        self._max_delay = max_delay.total_seconds()
        self._company = company
        self._halve_on = halve_on
        self._unclaimed = unclaimed
        self._pending: list[tuple[In, asyncio.Future[Out]]] = []
        self._flusher: asyncio.Task[None] | None = None

    async def submit(self, item: In) -> Out:
        """Return the result for one item, once its batch was flushed.

        An item stays in its batch when its submitter is cancelled.
        """
        future = self.put(item)
        try:
            return await future
        except asyncio.CancelledError:
            # The batch was through already, and only the news of it had not arrived.
            if future.done() and not future.cancelled() and future.exception() is None:
                self._unclaimed(item, future.result())
            raise

    def put(self, item: In) -> asyncio.Future[Out]:
        """Submit an item for which somebody else may wait."""
        future: asyncio.Future[Out] = asyncio.get_running_loop().create_future()
        self._pending.append((item, future))
        if self._flusher is None:
            self._flusher = asyncio.create_task(self._flush_all(), name="batcher")
        return future

    async def drain(self) -> None:
        """Wait until everything that was submitted is flushed."""
        while self._flusher is not None:
            await asyncio.wait([self._flusher])

    async def _flush_all(self) -> None:
        try:
            # One turn of the loop: whoever is ready in this one gets into the first batch.
            await asyncio.sleep(0)
            while self._pending:
                if self._max_delay and self._company(len(self._pending)):
                    await asyncio.sleep(self._max_delay)
                size = self._size_of_next()
                batch, self._pending = self._pending[:size], self._pending[size:]
                await self._flush_batch(batch)
        except asyncio.CancelledError as error:
            pending, self._pending = self._pending, []
            _fail(pending, error)
            raise
        finally:
            self._flusher = None

    def _size_of_next(self) -> int:
        weight = 0
        for size, (item, _) in enumerate(self._pending[: self._max_size]):
            weight += self._weigh(item)
            if weight > self._max_weight:
                return max(size, 1)
        return self._max_size

    async def _flush_batch(self, batch: Sequence[tuple[In, asyncio.Future[Out]]]) -> None:
        try:
            results = await self._flush([item for item, _ in batch])
            if len(results) != len(batch):
                msg = f"{len(results)} results for {len(batch)} items"
                raise ValueError(msg)  # noqa: TRY301 - it belongs to the submitters as well
        except self._halve_on as error:
            if len(batch) == 1:
                _fail(batch, error)
                return
            middle = len(batch) // 2
            await self._flush_batch(batch[:middle])
            await self._flush_batch(batch[middle:])
        except Exception as error:  # noqa: BLE001 - it belongs to the submitters, all of them
            _fail(batch, error)
        except asyncio.CancelledError as error:
            _fail(batch, error)
            raise
        else:
            for (item, future), result in zip(batch, results, strict=True):
                if future.done():
                    self._unclaimed(item, result)
                else:
                    future.set_result(result)


def _fail(batch: Sequence[tuple[In, asyncio.Future[Out]]], error: BaseException) -> None:
    for _, future in batch:
        if future.done():
            continue
        if isinstance(error, asyncio.CancelledError):
            future.cancel()
        else:
            future.set_exception(error)
