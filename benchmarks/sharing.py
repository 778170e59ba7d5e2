"""Identical jobs at once over four processes: how many calls they become, with and without a death."""

import asyncio
import time
from collections.abc import Sequence

from child import Child
from figures import Figure, progress
from stage import Stage, open_stage

from headrace_producer import JobRequest

_NAME = "identical jobs at once, 4 processes"
_JOBS = 1000
_WORKERS, _SLOTS = 4, 250
_LATENCY = 2.0
_LEASE_SECONDS = 5.0
_REQUEST = JobRequest(
    "/v1/chat/completions",
    {"model": "gpt-4o-mini", "temperature": 0, "messages": [{"role": "user", "content": "Say hello."}]},
)
_LEADER = """SELECT j.worker FROM headrace.flights f JOIN headrace.jobs j ON j.id = f.leader
WHERE j.state = 'running'"""
_ENDED = """SELECT count(*) FILTER (WHERE ended_at IS NOT NULL) AS ended,
       count(*) FILTER (WHERE state = 'succeeded') AS succeeded FROM headrace.jobs"""


async def measure(_jobs: int) -> list[Figure]:
    return [*await _share(killing=False), *await _share(killing=True)]


async def _share(*, killing: bool) -> list[Figure]:
    async with open_stage(latency=_LATENCY, lease_seconds=_LEASE_SECONDS) as stage:
        async with stage.workers(_WORKERS, slots=_SLOTS) as workers:
            began = time.monotonic()
            await stage.headrace.enqueue_many([_REQUEST] * _JOBS)
            if killing:
                await _kill_leader(stage, workers)
            succeeded = await _until_ended(stage)
            seconds = time.monotonic() - began
        calls = float((await stage.provider.ask())["requests"])
    name = f"{_NAME}, the leader's is killed" if killing else _NAME
    progress(f"{name}: {calls:.0f} calls")
    return [
        Figure(name, "calls", calls, "calls", at_most=2 if killing else 1),
        Figure(name, "jobs that succeeded", succeeded, f"of {_JOBS:,}", at_least=_JOBS),
        Figure(name, f"all ended, calls of {_LATENCY:.0f} s, leases of {_LEASE_SECONDS:.0f} s", seconds, "s"),
    ]


async def _kill_leader(stage: Stage, workers: Sequence[Child]) -> None:
    """Kill the process that makes the call, once the call is out."""
    while not (await stage.provider.ask())["in_flight"]:  # noqa: ASYNC110 - in another process
        await asyncio.sleep(0.02)
    leader = await stage.connection.fetchval(_LEADER)
    (its,) = [worker for worker in workers if f"-{worker.pid}-" in leader]
    its.kill()


async def _until_ended(stage: Stage) -> int:
    async with asyncio.timeout(120):
        while True:
            row = await stage.connection.fetchrow(_ENDED)
            if row is not None and row["ended"] == _JOBS:
                return int(row["succeeded"])
            await asyncio.sleep(0.1)
