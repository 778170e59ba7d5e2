"""Batches: what belongs together stays in order, and a bad item fails alone."""

import asyncio
from collections.abc import Sequence
from datetime import timedelta

import pytest

from headrace_shared.batching import Batcher


class Flusher:
    """Doubles numbers, batch by batch; each batch waits until it is let through."""

    def __init__(self, *, bad: frozenset[int] = frozenset(), held: bool = False) -> None:
        self.batches: list[list[int]] = []
        self.started = asyncio.Event()
        self.go = asyncio.Event()
        self._bad = bad
        if not held:
            self.go.set()

    async def __call__(self, items: Sequence[int]) -> Sequence[int]:
        self.batches.append(list(items))
        self.started.set()
        await self.go.wait()
        if self._bad.intersection(items):
            raise ValueError(str(items))
        return [2 * item for item in items]


async def test_each_submitter_gets_its_own_result() -> None:
    flusher = Flusher()
    batcher = Batcher[int, int](flusher, max_size=7)
    results = await asyncio.gather(*(batcher.submit(item) for item in range(20)))
    assert results == [2 * item for item in range(20)]
    assert flusher.batches == [list(range(7)), list(range(7, 14)), list(range(14, 20))]


async def test_what_comes_during_a_flush_makes_the_next_batch() -> None:
    flusher = Flusher(held=True)
    batcher = Batcher[int, int](flusher)
    first = asyncio.create_task(batcher.submit(0))
    await flusher.started.wait()
    others = asyncio.gather(*(batcher.submit(item) for item in range(1, 50)))
    await asyncio.sleep(0)
    assert flusher.batches == [[0]]
    flusher.go.set()
    assert [await first, *await others] == [2 * item for item in range(50)]
    assert flusher.batches == [[0], list(range(1, 50))]


async def test_an_idle_caller_waits_for_nobody_and_another_for_company() -> None:
    flusher = Flusher()
    never = timedelta(days=1)
    assert await Batcher[int, int](flusher, max_delay=never, company=lambda _: False).submit(3) == 6
    waiting = Batcher[int, int](flusher, max_delay=never, company=lambda pending: pending < 2)
    assert [*await asyncio.gather(waiting.submit(1), waiting.submit(2))] == [2, 4]
    assert flusher.batches == [[3], [1, 2]]


@pytest.mark.parametrize("bad", [0, 3, 8, 15])
async def test_halving_leaves_the_bad_item_alone(bad: int) -> None:
    flusher = Flusher(bad=frozenset({bad}))
    batcher = Batcher[int, int](flusher, halve_on=(ValueError,))
    submitted = (batcher.submit(item) for item in range(16))
    results = await asyncio.gather(*submitted, return_exceptions=True)
    assert [item for item, result in enumerate(results) if result != 2 * item] == [bad]
    assert isinstance(results[bad], ValueError)
    assert len(flusher.batches) == 1 + 2 * 4


async def test_other_errors_belong_to_the_whole_batch_and_to_no_other() -> None:
    flusher = Flusher(bad=frozenset({1}))
    batcher = Batcher[int, int](flusher, max_size=4, halve_on=(KeyError,))
    submitted = (batcher.submit(item) for item in range(6))
    results = await asyncio.gather(*submitted, return_exceptions=True)
    assert [isinstance(result, ValueError) for result in results] == [True] * 4 + [False] * 2
    assert len(flusher.batches) == 2
    assert await batcher.submit(9) == 18


async def test_the_item_of_a_cancelled_submitter_is_flushed_all_the_same() -> None:
    flusher = Flusher()
    batcher = Batcher[int, int](flusher)
    cancelled, patient = (asyncio.create_task(batcher.submit(item)) for item in (1, 2))
    await asyncio.sleep(0)
    cancelled.cancel()
    assert await patient == 4
    assert cancelled.cancelled()
    assert flusher.batches == [[1, 2]]


async def test_a_submitter_that_is_cancelled_during_the_flush_disturbs_nobody() -> None:
    flusher = Flusher(held=True)
    batcher = Batcher[int, int](flusher)
    cancelled, patient = (asyncio.create_task(batcher.submit(item)) for item in (1, 2))
    await flusher.started.wait()
    cancelled.cancel()
    await asyncio.wait([cancelled])
    flusher.go.set()
    assert await patient == 4


async def test_a_result_that_nobody_takes_is_told_to_who_can_give_it_back() -> None:
    flusher = Flusher(held=True)
    unclaimed: list[tuple[int, int]] = []
    batcher = Batcher[int, int](flusher, unclaimed=lambda item, result: unclaimed.append((item, result)))
    tasks = [asyncio.create_task(batcher.submit(item)) for item in (1, 2)]
    await flusher.started.wait()
    tasks[0].cancel()
    await asyncio.wait(tasks[:1])
    flusher.go.set()
    assert await tasks[1] == 4
    assert unclaimed == [(1, 2)]


async def test_a_result_is_told_as_well_when_its_submitter_is_cancelled_before_it_knows() -> None:
    unclaimed: list[tuple[int, int]] = []

    async def flush(items: Sequence[int]) -> Sequence[int]:
        # After the result is set, and before the submitter is woken.
        asyncio.get_running_loop().call_soon(task.cancel)
        return items

    batcher = Batcher[int, int](flush, unclaimed=lambda item, result: unclaimed.append((item, result)))
    task = asyncio.create_task(batcher.submit(7))
    await asyncio.wait([task])
    assert task.cancelled()
    assert unclaimed == [(7, 7)]


async def test_drain_waits_for_everything_that_was_submitted() -> None:
    flusher = Flusher(held=True)
    batcher = Batcher[int, int](flusher, max_size=1)
    submitted = [asyncio.create_task(batcher.submit(item)) for item in range(3)]
    await flusher.started.wait()
    draining = asyncio.create_task(batcher.drain())
    await asyncio.sleep(0)
    assert not draining.done()
    flusher.go.set()
    await draining
    assert flusher.batches == [[0], [1], [2]]
    assert await asyncio.gather(*submitted) == [0, 2, 4]
    await batcher.drain()


async def test_too_few_results_fail_their_batch_and_leave_nobody_waiting() -> None:
    async def forgetful(items: Sequence[int]) -> Sequence[int]:
        return items[:1]

    batcher = Batcher[int, int](forgetful)
    submitted = (batcher.submit(item) for item in range(3))
    results = await asyncio.gather(*submitted, return_exceptions=True)
    assert [type(result) for result in results] == [ValueError] * 3


async def test_a_cancelled_flush_leaves_nobody_waiting() -> None:
    async def cancelled(items: Sequence[int]) -> Sequence[int]:
        raise asyncio.CancelledError(items)

    batcher = Batcher[int, int](cancelled, max_size=1)
    submitted = (batcher.submit(item) for item in range(3))
    results = await asyncio.gather(*submitted, return_exceptions=True)
    assert [type(result) for result in results] == [asyncio.CancelledError] * 3


async def test_heavy_items_share_no_batch() -> None:
    batches: list[list[int]] = []

    async def flush(items: Sequence[int]) -> Sequence[int]:
        batches.append(list(items))
        return items

    batcher = Batcher[int, int](flush, max_weight=10, weigh=lambda item: item)
    await asyncio.gather(*(batcher.submit(item) for item in (4, 6, 1, 99, 5, 5)))
    assert batches == [[4, 6], [1], [99], [5, 5]]
