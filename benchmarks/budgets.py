"""Whether budgets hold under load, kills and restarts, and whether they are used: `make bench-budgets`.

Many processes hold and settle over overlapping scopes while some of them are killed and Redis is
restarted, with its data and without. Limits are small beside what is held at the same time; when
they are used up they are raised. Then workers run ten times the jobs that a budget has money for.
"""

import asyncio
import random
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import machine
import tally
import typer
from child import Child, child
from figures import Figure, progress, table
from rich.console import Console
from stage import Stage, body, open_stage

from headrace_producer import JobRequest
from headrace_shared.budgets import Budgets
from headrace_shared.dispatch import keys
from headrace_shared.dispatch.connection import Redis
from headrace_shared.dispatch.dispatch import Dispatch
from headrace_shared.errors import DispatchUnavailable
from headrace_shared.money import NanoUSD
from headrace_shared.store.money import BudgetPolicy, WindowKind
from headrace_shared.store.pool import UNREACHABLE, Pool, open_pool
from headrace_shared.testing.server_faults import OwnServers, valkey_down
from headrace_workers.breaker import Breakers
from headrace_workers.configured import Configured
from headrace_workers.reaper import Reaper

_LEASE = timedelta(seconds=5)
_AMOUNT = 1_000_000_007
"""Nano-USD that a call holds on average; what it costs is so little that the limits last."""
_AT_ONCE = 0.4
"""The share of all tasks that the global limit has room for at the same time."""
_KINDS = {"tenant:a": WindowKind.DAY, "key:ci": WindowKind.WEEK, "tag:y": WindowKind.MONTH}
_SHARES = {"global": 1.0, "tenant:a": 0.6, "tenant:b": 0.55, "key:ci": 0.6, "key:web": 0.35, "model:m": 0.5}
_OTHERS = 0.4
_USE = "SELECT scope, policy, limit_nano, settled_nano + suspense_nano + held_nano AS used \
FROM headrace.budget_use(NULL, headrace.now())"
_LOOK = 0.5
_STILL = 5
"""Seconds without progress after which the limits are taken to be used up."""
_INPUT, _CACHED, _OUTPUT = 150, 75, 600
"""Nano-USD of a token of gpt-4o-mini."""


@dataclass
class Load:
    """The processes that spend, what is done to them, and what was seen."""

    stage: Stage
    pool: Pool
    redis: Redis
    size: "Size"
    limits: dict[str, int] = field(default_factory=dict[str, int])
    tallies: list[Path] = field(default_factory=list[Path])
    children: list[Child] = field(default_factory=list[Child])
    over: int = 0
    """The most that any scope was above its limit at any look, in nano-USD."""
    looks: int = 0
    kills: int = 0
    restarts: int = 0
    raises: int = 0

    async def start(self, stack: AsyncExitStack, place: int) -> None:
        """Start a process that spends, in the place of one that was killed or as another one."""
        path = self.stage.directory / f"tally-{len(self.tallies)}"
        size = self.size
        self.tallies.append(path)
        process = await stack.enter_async_context(
            child(
                "spending_process.py",
                size.seed + len(self.tallies),
                size.tasks,
                _AMOUNT,
                size.cost,
                _LEASE.total_seconds(),
                str(path),
                environment=self.stage.environment(),
            )
        )
        self.children[place:place] = [process]
        await process.hear()

    async def look(self) -> None:
        """Compare what the ledger says of every budget at one moment with its limit."""
        with suppress(*UNREACHABLE):
            for row in await self.pool.fetch(_USE):
                if row["policy"] != BudgetPolicy.SOFT:
                    self.over = max(self.over, row["used"] - row["limit_nano"])
            self.looks += 1

    def operations(self) -> int:
        return tally.read(self.tallies)["operations"]


@dataclass(frozen=True, slots=True)
class Size:
    operations: int
    processes: int
    tasks: int
    seed: int

    @property
    def room(self) -> int:
        """What the global limit is, in holds of average size."""
        return max(20, round(self.processes * self.tasks * _AT_ONCE))

    @property
    def cost(self) -> int:
        """What a call costs on average, so that the limit is reached when half of all are done."""
        return self.room * _AMOUNT // max(1, self.operations // 4)


async def spend(size: Size) -> list[Figure]:
    async with open_stage() as stage, _tools(stage) as (pool, redis):
        load = Load(stage, pool, redis, size)
        await _set_limits(load)
        reaping = asyncio.create_task(_reap(pool, redis))
        async with AsyncExitStack() as stack:
            for place in range(size.processes):
                await load.start(stack, place)
            began = time.monotonic()
            for process in load.children:
                await process.tell()
            await _disturb(load, stack)
            await asyncio.gather(*(process.leave() for process in load.children))
        seconds = time.monotonic() - began
        operations = load.operations()
        await asyncio.sleep(_LEASE.total_seconds() + 5)
        await load.look()
        leaked, open_calls = await _left(load)
        calls = await pool.fetchval("SELECT count(*) FROM headrace.calls")
        reaping.cancel()
        return [
            *_figures(load, operations, int(calls), seconds),
            *_leaks(leaked, open_calls),
            *await _books(load),
        ]


@asynccontextmanager
async def _tools(stage: Stage) -> AsyncGenerator[tuple[Pool, Redis]]:
    pool = await open_pool(stage.postgres_url, size=3)
    redis = Redis(stage.redis_url)
    try:
        yield pool, redis
    finally:
        await redis.close()
        await pool.close()


async def _set_limits(load: Load, share: float = 1) -> None:
    budgets = Budgets(load.pool, load.redis)
    for scope in sorted({scope for scopes in tally.SCOPES for scope in scopes}):
        limit = NanoUSD(round(load.size.room * share * _SHARES.get(scope, _OTHERS)) * _AMOUNT)
        soft = scope == "tag:counted"
        load.limits[scope] = limit
        policy = BudgetPolicy.SOFT if soft else BudgetPolicy.WAIT
        await budgets.set(scope, _KINDS.get(scope, WindowKind.TOTAL), limit, policy)


async def _reap(pool: Pool, redis: Redis) -> None:
    """Do what the leader of a fleet does."""
    dispatch, configured = Dispatch(redis), await Configured.load(pool)
    reaper = Reaper(
        pool, dispatch, Budgets(pool, redis), Breakers(dispatch, configured), configured, lease=_LEASE
    )
    while True:
        with suppress(DispatchUnavailable, *UNREACHABLE):
            await reaper.turn()
        await asyncio.sleep(1)


async def _disturb(load: Load, stack: AsyncExitStack) -> None:
    """Look, kill and restart until so many operations are done."""
    chance = random.Random(load.size.seed)  # noqa: S311 - a seeded choice, no secret
    own = OwnServers.of(load.stage.directory)
    # What happens when which share of the work is done.
    kills = [(place + 1) / 13 for place in range(12)]
    restarts = [0.15, 0.35, 0.55, 0.75]
    last, moved = 0, time.monotonic()
    while (done := load.operations()) < load.size.operations:
        await load.look()
        share = done / load.size.operations
        if done > last + load.size.operations // 100:
            last, moved = done, time.monotonic()
        elif time.monotonic() - moved > _STILL:
            load.raises += 1
            await _set_limits(load, 1 + load.raises / 2)
            moved = time.monotonic()
        if kills and share >= kills[0]:
            kills.pop(0)
            place = chance.randrange(len(load.children))
            load.children.pop(place).kill()
            load.kills += 1
            await load.start(stack, place)
            await load.children[place].tell()
        if restarts and share >= restarts[0]:
            restarts.pop(0)
            async with valkey_down(own, data="lost" if len(restarts) % 2 else "kept"):
                await asyncio.sleep(1)
            load.restarts += 1
            progress(f"{done:,} operations, {load.kills} kills, {load.restarts} restarts of Redis")
        await asyncio.sleep(_LOOK)


async def _left(load: Load) -> tuple[int, int]:
    """Count holds in Redis, and calls that are open in the ledger."""
    held = await load.redis.hash(keys.HOLDS)
    counted = await load.redis.hash(keys.SPENT)
    still = sum(value != "0" for name, value in counted.items() if name.endswith("|held"))
    open_calls = await load.pool.fetchval("SELECT count(*) FROM headrace.calls WHERE state = 'open'")
    return len(held.keys() - {"epoch"}) + still, int(open_calls)


def _figures(load: Load, operations: int, calls: int, seconds: float) -> list[Figure]:
    name = f"{load.size.processes} processes x {load.size.tasks} tasks"
    return [
        Figure(name, "operations", operations, "operations"),
        Figure(name, "calls that were paid for", calls, "calls"),
        Figure(name, "pace", operations / seconds, "operations/s"),
        Figure(name, "processes killed", load.kills, "processes"),
        Figure(name, "restarts of Redis", load.restarts, "restarts"),
        Figure(name, "limits raised when they were used up", load.raises, "times"),
        Figure(name, "looks at the ledger", load.looks, "looks"),
        Figure(name, "overspend at any look", load.over, "nano-USD", at_most=0),
    ]


def _leaks(leaked: int, open_calls: int) -> list[Figure]:
    name = f"{_LEASE.total_seconds():.0f} s lease and 5 s after the end"
    return [
        Figure(name, "leaked holds", leaked, "holds", at_most=0),
        Figure(name, "open calls without a run", open_calls, "calls", at_most=0),
    ]


async def _books(load: Load) -> list[Figure]:
    """Compare what the processes were billed with the limits, and with the ledger."""
    billed = tally.read(load.tallies)
    ledger = {
        row["scope"]: (int(row["settled"]), int(row["suspense"]))
        for row in await load.pool.fetch(
            "SELECT scope, sum(settled_nano) AS settled, sum(suspense_nano) AS suspense"
            " FROM headrace.spend WHERE window_name = 'total' GROUP BY scope"
        )
    }
    hard = [scope for scope in load.limits if scope != "tag:counted"]
    over = max(billed[scope] - load.limits[scope] for scope in hard)
    missed = max(billed[scope] - sum(ledger.get(scope, (0, 0))) for scope in load.limits)
    used = max(sum(ledger.get(scope, (0, 0))) / load.limits[scope] for scope in hard)
    name = "books of the processes"
    return [
        Figure(name, "billed over any limit", max(0, over), "nano-USD", at_most=0),
        Figure(name, "billed and not in the ledger", max(0, missed), "nano-USD", at_most=0),
        Figure(name, "the fullest budget", 100 * used, "%"),
    ]


async def use(jobs: int, workers: int, slots: int) -> list[Figure]:
    """Run jobs of ten times a budget's money."""
    name = f"{jobs:,} jobs, the money of {jobs // 10:,}, {workers} workers x {slots}"
    async with open_stage(latency=0.2) as stage, _tools(stage) as (pool, redis):
        async with stage.workers(workers, slots=slots):
            await stage.headrace.enqueue_many(_requests(200, "measured"))
            await _ended(stage, "measured", 200)
            before = await _bill(stage)
            limit = NanoUSD(before * (jobs // 10) // 200)
            await Budgets(pool, redis).set("tenant:limited", WindowKind.TOTAL, limit, BudgetPolicy.WAIT)
            began = time.monotonic()
            await stage.headrace.enqueue_many(_requests(jobs, "limited"))
            await _ended(stage, "limited", jobs)
            seconds = time.monotonic() - began
        billed = await _bill(stage) - before
        claims = await stage.connection.fetchval(
            "SELECT sum(run) FROM headrace.jobs WHERE tenant = 'limited'"
        )
        hold = await stage.connection.fetchval(
            "SELECT max(held_nano) FROM headrace.calls WHERE tenant = 'limited'"
        )
        # A budget that has the money of few jobs cannot be used to the last per cent: one hold is more.
        fine = 100 * hold / limit < 1
        return [
            Figure(name, "billed over the limit", max(0, billed - limit), "nano-USD", at_most=0),
            Figure(name, "of the budget used", 100 * billed / limit, "%", at_least=99 if fine else None),
            Figure(name, "left of it when the last one failed", (limit - billed) / hold, "holds", at_most=1),
            Figure(name, "until the last job had ended", seconds, "s"),
            Figure(name, "claims of a job", int(claims) / jobs, "claims"),
        ]


def _requests(count: int, tenant: str) -> list[JobRequest]:
    return [
        JobRequest("/v1/chat/completions", {**body(number), "max_completion_tokens": 64}, tenant=tenant)
        for number in range(count)
    ]


async def _ended(stage: Stage, tenant: str, count: int) -> None:
    sql = "SELECT count(*) FROM headrace.jobs WHERE tenant = $1 AND ended_at IS NOT NULL"
    async with asyncio.timeout(900):
        while True:
            if await stage.connection.fetchval(sql, tenant) >= count:
                return
            await asyncio.sleep(0.2)


async def _bill(stage: Stage) -> int:
    said = await stage.provider.ask()
    prompt, cached, written = (int(said[f"{kind}_tokens"]) for kind in ("prompt", "cached", "completion"))
    return (prompt - cached) * _INPUT + cached * _CACHED + written * _OUTPUT


def main(
    *,
    operations: Annotated[int, typer.Option(min=1000, help="Holds and settlements.")] = 1_000_000,
    processes: Annotated[int, typer.Option(min=1)] = 32,
    tasks: Annotated[int, typer.Option(min=1, help="In each process.")] = 64,
    jobs: Annotated[int, typer.Option(min=0, help="Of the run end to end; 0 leaves it out.")] = 5000,
    workers: Annotated[int, typer.Option(min=1)] = 4,
    slots: Annotated[int, typer.Option(min=1)] = 200,
    seed: int = 1315,
) -> None:
    """Spend from overlapping budgets under kills and restarts, and use one up end to end."""
    progress(", ".join(f"{name} {value}" for name, value in machine.describe().items()))
    figures = asyncio.run(spend(Size(operations, processes, tasks, seed)))
    if jobs:
        figures += asyncio.run(use(jobs, workers, slots))
    console = Console()
    if not console.is_terminal:
        console.width = 120
    console.print(table(figures, title="Budgets"))
    if any(figure.met is False for figure in figures):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
