"""What jobs in flight take of a worker's memory."""

import asyncio

from figures import Figure, progress
from stage import Stage, open_stage, requests

_NAME = "memory"
_IN_FLIGHT = 2000
_WARM_UP = 100
_POLL_SECONDS = 0.2
_PATIENCE_SECONDS = 60


async def measure(jobs: int) -> list[Figure]:
    del jobs
    async with open_stage(latency=600) as stage, stage.workers(1, slots=_IN_FLIGHT) as (worker,):
        idle = await worker.resident()
        await _fill(stage, _WARM_UP)
        some = await worker.resident()
        await _fill(stage, _IN_FLIGHT)
        full = await worker.resident()
        worker.kill()
        stage.provider.kill()
    progress(f"{_NAME}: {idle:.0f} MiB idle, {full:.0f} MiB with {_IN_FLIGHT:,} jobs in flight")
    return [
        Figure(_NAME, "resident, idle", idle, "MiB"),
        Figure(_NAME, f"resident, {_IN_FLIGHT:,} jobs in flight", full, "MiB"),
        Figure(_NAME, "more jobs in flight", 1000 * (full - some) / (_IN_FLIGHT - _WARM_UP), "MiB per 1,000"),
    ]


async def _fill(stage: Stage, target: int) -> None:
    """Enqueue jobs until so many are at the provider."""
    present = int((await stage.provider.ask())["in_flight"])
    await stage.headrace.enqueue_many(requests(target - present))
    async with asyncio.timeout(_PATIENCE_SECONDS):
        while True:
            if int((await stage.provider.ask())["in_flight"]) == target:
                return
            await asyncio.sleep(_POLL_SECONDS)
