"""One process that spends: `spending_process.py SEED TASKS AMOUNT COST LEASE TALLY`.

From a line of input on until there is no more it holds, makes the call's intent known, "calls",
concludes and settles, with many tasks at once, as a worker does. What its calls cost is added to a
file of its own, as a provider's books would have it.
"""

import asyncio
import contextlib
import os
import random
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import uvloop
from tally import SCOPES, Tally

from headrace_shared.batching import Batcher
from headrace_shared.budgets import Budgets, Held, HoldRequest, Settlement
from headrace_shared.dispatch.connection import Redis
from headrace_shared.errors import DispatchUnavailable
from headrace_shared.ids import CallNumber, Lane, RouteName, Tenant, WorkerId, hold_id, new_job_id
from headrace_shared.job import ClaimedJob, NewJob
from headrace_shared.money import NanoUSD
from headrace_shared.request import Endpoint
from headrace_shared.store import claims, jobs, runs
from headrace_shared.store.money import Refused
from headrace_shared.store.pool import UNREACHABLE, Pool, open_pool

_DAY = timedelta(days=1)
_PAUSE = 1.0
"""Seconds that a task waits that was refused."""


class Spender:
    """Spends in the name of one job, for as long as its lease is renewed."""

    def __init__(self, pool: Pool, redis: Redis, job: ClaimedJob, tally: Tally, seed: int) -> None:
        self._pool = pool
        self._budgets = Budgets(pool, redis)
        self._job = job
        self._tally = tally
        self._random = random.Random(seed)  # noqa: S311 - a seeded load, no secret
        self._calls = 0
        self._shard = 1 + seed % 8
        self._holds = Batcher[HoldRequest, Held | Refused](self._budgets.hold)
        self._intents = Batcher[tuple[Held, runs.Intent], bool](self._open)
        self._ends = Batcher[tuple[runs.Conclusion | None, Settlement], None](self._conclude)

    async def spend(self, stop: asyncio.Event, amount: int, cost: int) -> None:
        while not stop.is_set():
            try:
                paid = await self._call(amount, cost)
            except (DispatchUnavailable, *UNREACHABLE):
                paid = False
            if not paid:
                await asyncio.sleep(_PAUSE * self._random.uniform(0.1, 2))

    async def _call(self, amount: int, cost: int) -> bool:
        self._calls += 1
        number = CallNumber(self._calls)
        scopes = self._random.choice(SCOPES)
        most = NanoUSD(self._random.randint(1, 2 * amount))
        request = HoldRequest(hold_id(self._job.id, self._job.run, number), most, scopes)
        held = await self._holds.submit(request)
        if isinstance(held, Refused):
            return False
        self._tally.count(1)
        intent = runs.Intent(
            job_id=self._job.id,
            run=self._job.run,
            call=number,
            provider="openai",
            model="m",
            hold_id=held.id,
            held=most,
            held_at=held.at,
            scopes=scopes,
            price_version="1",
        )
        conclusion = None
        billed = NanoUSD(min(most, self._random.randint(0, 2 * cost)))
        if await self._intents.submit((held, intent)):
            self._tally.bill(scopes, billed)
            conclusion = runs.Conclusion(
                self._job.id, self._job.run, number, "answered", timedelta(0), cost=billed, answer=b""
            )
        await self._ends.submit((conclusion, Settlement(held.id, billed if conclusion else NanoUSD(0))))
        self._tally.count(1)
        return conclusion is not None

    async def _open(self, batch: Sequence[tuple[Held, runs.Intent]]) -> Sequence[bool]:
        accepted: set[object] = set()
        for epoch in {held.epoch for held, _ in batch}:
            intents = [intent for held, intent in batch if held.epoch == epoch]
            accepted |= {call for _, call in await runs.open_calls(self._pool, epoch, intents)}
        if not accepted:
            await self._budgets.check_epoch()
        return [intent.call in accepted for _, intent in batch]

    async def _conclude(self, batch: Sequence[tuple[runs.Conclusion | None, Settlement]]) -> Sequence[None]:
        worker = WorkerId(str(os.getpid()))
        known = [conclusion for conclusion, _ in batch if conclusion]
        await runs.finish(self._pool, worker, self._shard, conclusions=known, attempts=[], ends=[])
        try:
            await self._budgets.settle([settlement for _, settlement in batch])
        except DispatchUnavailable:
            self._budgets.distrust()
        return [None] * len(batch)


async def _own_job(pool: Pool, lease: timedelta) -> ClaimedJob:
    job = NewJob(
        id=new_job_id(),
        tenant=Tenant("load"),
        lane=Lane("default"),
        route=RouteName("m"),
        endpoint=Endpoint.CHAT_COMPLETIONS,
        body=b"{}",
        max_attempts=1,
    )
    await jobs.insert_jobs(pool, [job], configuration=0, keep_keys=_DAY)
    (claimed,) = (await claims.claim_jobs(pool, [job.id], WorkerId(str(os.getpid())), lease)).jobs
    return claimed


async def _beat(pool: Pool, job: ClaimedJob, ended: asyncio.Event, stop: asyncio.Event) -> None:
    """Renew the lease until all is ended, or the lease was lost: who lost it must not go on."""
    while not ended.is_set():
        with contextlib.suppress(*UNREACHABLE):
            if not await claims.heartbeat(pool, [job]):
                break
        await asyncio.sleep(job.lease.total_seconds() / 5)
    stop.set()


async def _live(pool: Pool, redis: Redis, tally: Tally, ended: asyncio.Event) -> None:
    """Spend in the name of one job for as long as it is this process's."""
    seed, tasks, amount, cost = map(int, sys.argv[1:5])
    job = await _own_job(pool, timedelta(seconds=float(sys.argv[5])))
    stop = asyncio.Event()
    spender = Spender(pool, redis, job, tally, seed)
    async with asyncio.TaskGroup() as group:
        group.create_task(_beat(pool, job, ended, stop))
        for _ in range(tasks):
            group.create_task(spender.spend(stop, amount, cost))


async def main() -> None:
    pool = await open_pool(os.environ["HEADRACE_POSTGRES_URL"], size=2)
    redis = Redis(os.environ["HEADRACE_REDIS_URL"])
    tally = Tally.open(Path(sys.argv[6]))
    ended = asyncio.Event()

    async def listen() -> None:
        await asyncio.to_thread(sys.stdin.readline)
        ended.set()

    print("{}", flush=True)
    if await asyncio.to_thread(sys.stdin.readline):
        listening = asyncio.create_task(listen())
        while not ended.is_set():
            await _live(pool, redis, tally, ended)
        await listening
    await redis.close()
    await pool.close()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
