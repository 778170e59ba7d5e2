"""What a flood of one tenant does to the others: their shares of the money, and the wait of a single job."""

import asyncio
import statistics
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from figures import Figure, progress
from stage import Stage, open_stage

from headrace_producer import JobRequest

T = TypeVar("T")

_FLOOD = "flood"
_MODELS = ("gpt-4o-mini", "gpt-4o")
_DEARER = 16
"""A call of the second model costs about so many times as much as one of the first."""
_SMALL = 10
_LONES = 20
_WORKERS, _SLOTS, _LATENCY = 2, 20, 0.2
_CHUNK = 10_000
_LEAST_FLOOD = 10_000
_LOOK_SECONDS = 0.2
_PATIENCE_SECONDS = 1200

_SERVED = """SELECT min(last) FROM (
    SELECT tenant, max(started_at) AS last FROM headrace.jobs WHERE tenant = ANY($1::text[])
    GROUP BY tenant HAVING bool_and(started_at IS NOT NULL)) AS served"""
_SETTLED = "SELECT count(*) = 0 FROM headrace.jobs WHERE started_at <= $1 AND ended_at IS NULL"
_SHARES = """SELECT j.tenant, sum(c.cost_nano)::bigint AS cost, count(DISTINCT j.id) AS jobs
FROM headrace.jobs j JOIN headrace.calls c ON c.job_id = j.id
WHERE j.started_at <= $1 AND j.tenant = ANY($2::text[]) GROUP BY j.tenant"""
_WAIT = """SELECT extract(epoch FROM started_at - created_at)::float8
FROM headrace.jobs WHERE tenant = $1 AND ended_at IS NOT NULL"""
_PACE = """SELECT (count(*) / extract(epoch FROM max(j.started_at) - min(j.started_at)))::float8
FROM headrace.jobs j, (SELECT min(created_at) AS first, max(started_at) AS last
                       FROM headrace.jobs WHERE tenant = $1) AS single
WHERE j.started_at BETWEEN single.first AND single.last"""


async def measure(jobs: int) -> list[Figure]:
    flood = max(jobs, _LEAST_FLOOD)
    each = max(200, flood // 1000)
    async with open_stage(latency=_LATENCY) as stage:
        async with stage.workers(_WORKERS, slots=_SLOTS):
            alone = await _waits(stage, "alone")
        small = await _enqueue(stage, flood, each)
        async with stage.workers(_WORKERS, slots=_SLOTS):
            shares = await _shares(stage, [*small, _FLOOD])
            beside = await _waits(stage, "beside")
        pace = float(await stage.connection.fetchval(_PACE, "beside"))
    name = (
        f"one of {_SMALL + 1} tenants has {flood:,} jobs queued, the others {each:,} or {each // _DEARER:,}"
    )
    # How long a slot is taken by one job, with all that a loaded machine adds to the call.
    turn = 1000 * _WORKERS * _SLOTS / pace
    costs = [cost for cost, _ in shares.values()]
    counts = [count for _, count in shares.values()]
    return [
        Figure(name, "Jain's index over tenants, by cost", _jain(costs), "", at_least=0.95),
        Figure(name, "Jain's index over tenants, by jobs", _jain(counts), ""),
        Figure(
            name, "wait of another's single job, median", 1000 * statistics.median(beside), "ms", at_most=turn
        ),
        Figure(name, "wait of another's single job, longest", 1000 * max(beside), "ms", at_most=turn),
        Figure(name, "the same without the flood, longest", 1000 * max(alone), "ms"),
        Figure(name, "a slot's time: slots / pace", turn, "ms"),
    ]


async def _enqueue(stage: Stage, flood: int, each: int) -> list[str]:
    for start in range(0, flood, _CHUNK):
        await stage.headrace.enqueue_many(_requests(_FLOOD, min(_CHUNK, flood - start)))
        progress(f"{start + _CHUNK:,} of {flood:,} enqueued")
    small = [f"small-{number}" for number in range(_SMALL)]
    for number, tenant in enumerate(small):
        dear = number % 2
        count = each // _DEARER if dear else each
        await stage.headrace.enqueue_many(_requests(tenant, count, model=_MODELS[dear]))
    return small


def _requests(tenant: str, count: int, *, model: str = _MODELS[0]) -> Sequence[JobRequest]:
    messages = [{"role": "user", "content": "Say hello."}]
    return [
        JobRequest("/v1/chat/completions", {"model": model, "messages": messages}, tenant=tenant)
        for _ in range(count)
    ]


async def _shares(stage: Stage, tenants: list[str]) -> dict[str, tuple[int, int]]:
    """Return what each tenant got, in nano-USD and jobs, until the first of them had nothing left."""
    until = await _eventually(lambda: stage.connection.fetchval(_SERVED, tenants))
    await _eventually(lambda: stage.connection.fetchval(_SETTLED, until))
    rows = await stage.connection.fetch(_SHARES, until, tenants)
    return {row["tenant"]: (int(row["cost"]), int(row["jobs"])) for row in rows}


async def _waits(stage: Stage, tenant: str) -> list[float]:
    """Enqueue single jobs, one after the other; return for how many seconds each waited for a worker."""
    for _ in range(_LONES):
        (job,) = await stage.headrace.enqueue_many(_requests(tenant, 1))
        await job.result()
    return [float(row[0]) for row in await stage.connection.fetch(_WAIT, tenant)]


async def _eventually(read: Callable[[], Awaitable[T | None]]) -> T:
    """Read until there is something true, and return it."""
    async with asyncio.timeout(_PATIENCE_SECONDS):
        while True:
            if found := await read():
                return found
            await asyncio.sleep(_LOOK_SECONDS)


def _jain(shares: Sequence[int]) -> float:
    return sum(shares) ** 2 / (len(shares) * sum(share * share for share in shares))
