"""How long it takes to recover from crashes, and what they cost: `make recovery`."""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta

from child import Child
from figures import Figure, progress
from stage import Stage, open_stage, requests

from headrace_shared.testing.server_faults import OwnServers, flush_redis, valkey_down

_LEASE = 5.0
_LOOK_SECONDS = 0.02
_PATIENCE_SECONDS = 300
_QUEUED, _RUNNING = 10_000, 200
_DEEP = 100_000
_AWAY = timedelta(seconds=60)
_LEFT = "SELECT count(*) FROM headrace.jobs WHERE ended_at IS NULL"
_UNHAPPY = "SELECT count(*) FROM headrace.jobs WHERE ended_at IS NOT NULL AND state <> 'succeeded'"
_ENDED = "SELECT count(*) FROM headrace.jobs WHERE ended_at IS NOT NULL"
_HELD = """SELECT count(*) FROM headrace.jobs
WHERE state = 'running' AND split_part(reverse(worker), '-', 2) = reverse($1)"""
_CALLED = "SELECT count(*) FROM headrace.calls WHERE state = 'answered'"


async def measure(jobs: int) -> list[Figure]:
    del jobs
    return [
        *await _killed_worker(),
        *await _frozen_worker(),
        *await _flushed(),
        *await _deep_queue(),
        *await _without_redis(),
    ]


async def _killed_worker() -> list[Figure]:
    name = "worker killed, 100 calls out"
    async with (
        open_stage(latency=3, lease_seconds=_LEASE) as stage,
        stage.workers(1, slots=100) as (victim,),
    ):
        await stage.headrace.enqueue_many(requests(100))
        await _until(lambda: _in_flight(stage), 100)
        async with stage.workers(1, slots=100):
            victim.kill()
            began = time.monotonic()
            await _until(lambda: _count(stage, _HELD, str(victim.pid)), 0)
            back = time.monotonic() - began
            await _until(lambda: _count(stage, _LEFT), 0)
        return [
            Figure(name, f"lease of {_LEASE:.0f} s, until all are taken back", back, "s", at_most=_LEASE + 2),
            *await _verdict(stage, name, paid_again_at_most=100),
        ]


async def _frozen_worker() -> list[Figure]:
    name = "worker frozen past its lease, 100 calls out"
    async with (
        open_stage(latency=3, lease_seconds=_LEASE) as stage,
        stage.workers(1, slots=100) as (victim,),
    ):
        await stage.headrace.enqueue_many(requests(100))
        await _until(lambda: _in_flight(stage), 100)
        os.kill(victim.pid, signal.SIGSTOP)
        async with stage.workers(1, slots=100):
            await _until(lambda: _count(stage, _LEFT), 0)
            os.kill(victim.pid, signal.SIGCONT)
            await victim.ask()
            await stage.headrace.enqueue_many(requests(100))
            await _until(lambda: _count(stage, _LEFT), 0)
        return await _verdict(stage, name, paid_again_at_most=100)


async def _flushed() -> list[Figure]:
    name = f"FLUSHALL, {_QUEUED:,} queued, {_RUNNING} running"
    async with open_stage(latency=0.5) as stage, stage.workers(2, slots=_RUNNING // 2):
        await stage.headrace.enqueue_many(requests(_QUEUED + _RUNNING))
        await _until(lambda: _in_flight(stage), _RUNNING)
        await flush_redis(stage.redis_url)
        began = time.monotonic()
        await _until(lambda: _count(stage, _LEFT), 0)
        progress(f"{name}: all ended {time.monotonic() - began:.1f} s later")
        return await _verdict(stage, name, paid_again_at_most=0)


async def _deep_queue() -> list[Figure]:
    name = f"FLUSHALL, {_DEEP:,} queued"
    async with open_stage() as stage, stage.workers(1, slots=500):
        await stage.headrace.enqueue_many(requests(_DEEP))
        before = await _pace(stage)
        await flush_redis(stage.redis_url)
        began, ended = time.monotonic(), await _count(stage, _ENDED)
        # What was running at that moment ends too: the first of the others counts.
        await _until(lambda: _count(stage, _ENDED), ended + 501, at_least=True)
        resumed = time.monotonic() - began
        after = await _pace(stage)
        return [
            Figure(name, "until new jobs end", resumed, "s", at_most=5),
            Figure(name, "pace before", before, "jobs/s"),
            Figure(name, "pace after", after, "jobs/s"),
            Figure(name, "pace after / before", after / before, "x", at_least=0.9),
        ]


async def _pace(stage: Stage) -> float:
    first, began = await _count(stage, _ENDED), time.monotonic()
    await _until(lambda: _count(stage, _ENDED), first + 5000, at_least=True)
    return (await _count(stage, _ENDED) - first) / (time.monotonic() - began)


async def _without_redis() -> list[Figure]:
    name = f"Redis away for {_AWAY.total_seconds():.0f} s"
    async with open_stage(latency=0.2, lease_seconds=_LEASE) as stage, stage.workers(2, slots=50) as workers:
        slowest = 0.0
        await stage.headrace.enqueue_many(requests(100))
        await _until(lambda: _count(stage, _LEFT), 0)
        async with valkey_down(OwnServers.of(stage.directory)):
            began = time.monotonic()
            while time.monotonic() - began < _AWAY.total_seconds():
                asked = time.monotonic()
                await stage.headrace.enqueue_many(requests(10))
                slowest = max(slowest, time.monotonic() - asked)
                await asyncio.sleep(0.5)
            ended = await _count(stage, _ENDED) - 100
        back = time.monotonic()
        await _until(lambda: _count(stage, _LEFT), 0)
        drained = time.monotonic() - back
        return [
            Figure(name, "slowest enqueue of 10", 1000 * slowest, "ms"),
            Figure(name, "jobs that ended meanwhile", ended, "jobs"),
            Figure(name, "until the rest had ended", drained, "s"),
            Figure(name, "processes that ended", await _dead(workers), "processes", at_most=0),
            *await _verdict(stage, name, paid_again_at_most=0),
        ]


async def _verdict(stage: Stage, name: str, *, paid_again_at_most: int) -> list[Figure]:
    answered = float((await stage.provider.ask())["answered"])
    again = answered - await _count(stage, _ENDED)
    return [
        Figure(name, "jobs that did not succeed", await _count(stage, _UNHAPPY), "jobs", at_most=0),
        Figure(name, "answers paid for again", again, "calls", at_most=paid_again_at_most),
        Figure(name, "answered calls the ledger misses", answered - await _count(stage, _CALLED), "calls"),
    ]


async def _dead(workers: list[Child]) -> int:
    dead = 0
    for worker in workers:
        try:
            await worker.ask()
        except RuntimeError:
            dead += 1
    return dead


async def _in_flight(stage: Stage) -> int:
    return int((await stage.provider.ask())["in_flight"])


async def _count(stage: Stage, sql: str, *args: str) -> int:
    return int(await stage.connection.fetchval(sql, *args))


async def _until(read: Callable[[], Awaitable[int]], wanted: int, *, at_least: bool = False) -> None:
    async with asyncio.timeout(_PATIENCE_SECONDS):
        while True:
            found = await read()
            if found == wanted or (at_least and found > wanted):
                return
            await asyncio.sleep(_LOOK_SECONDS)
