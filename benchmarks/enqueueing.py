"""How fast the client accepts jobs: one after the other, many at once, and in bulk."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from statistics import median

from figures import Figure, progress
from stage import body, open_stage, requests

from headrace_producer import Headrace

_NAME = "enqueue"
_AT_ONCE = 100
_BULK = 10
_ROUNDS = 3


async def measure(jobs: int) -> list[Figure]:
    ways: list[tuple[str, int, Callable[[Headrace, int], Awaitable[None]], float | None]] = [
        ("one after the other", jobs // 4, _one_by_one, None),
        (f"{_AT_ONCE} callers at once", jobs, _at_once, None),
        (f"enqueue_many of {_BULK * jobs:,}", _BULK * jobs, _in_bulk, 15_000),
    ]
    figures: list[Figure] = []
    async with open_stage() as stage:
        await stage.headrace.enqueue_many(requests(100))
        for name, count, way, target in ways:
            rate = median([count / await _timed(way(stage.headrace, count)) for _ in range(_ROUNDS)])
            progress(f"enqueue, {name}: {rate:,.0f} jobs/s")
            figures.append(Figure(_NAME, name, rate, "jobs/s", at_least=target))
    return figures


async def _timed(work: Awaitable[None]) -> float:
    began = time.perf_counter()
    await work
    return time.perf_counter() - began


async def _one_by_one(headrace: Headrace, count: int) -> None:
    for number in range(count):
        await headrace.enqueue("/v1/chat/completions", body(number))


async def _at_once(headrace: Headrace, count: int) -> None:
    await asyncio.gather(*(_one_by_one(headrace, count // _AT_ONCE) for _ in range(_AT_ONCE)))


async def _in_bulk(headrace: Headrace, count: int) -> None:
    await headrace.enqueue_many(requests(count))
