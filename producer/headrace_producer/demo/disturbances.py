"""What the demo does to its own run: an outage of the provider, and the death of a worker."""

import asyncio
import time
from dataclasses import dataclass, replace
from datetime import timedelta

from headrace_producer.demo import ledger
from headrace_producer.demo.ledger import Holding
from headrace_producer.demo.observer import Observer
from headrace_producer.demo.screen import Screen
from headrace_producer.demo.stage import Stage
from headrace_producer.processes import Child
from headrace_shared.testing.simulated_provider import SimulatedProvider

OUTAGE = timedelta(seconds=3)
_OPEN_SECONDS = 15.0
_CLOSE_SECONDS = 30.0
_RETURN_SECONDS = 45.0
_LOOK_SECONDS = 0.02
_SETTLING_SECONDS = 0.3
"""After the death of a process: what it had sent to Postgres is through by then."""


@dataclass(frozen=True, slots=True)
class Outage:
    """What was seen of the outage."""

    opened: int
    closed: int


@dataclass(frozen=True, slots=True)
class Crash:
    """What a killed worker left behind, and when it was taken up."""

    pid: int
    holding: Holding
    returned: int
    returned_after: timedelta | None
    """None when not all of its jobs came back."""


async def cause_outage(provider: SimulatedProvider, observer: Observer, screen: Screen) -> Outage:
    """Let the provider answer 503 for some seconds, and wait until the breakers are closed again."""
    screen.event("The provider goes DOWN: every call is answered 503", "bold red")
    provider.behave(replace(provider.behaviour, outage=True))
    began = time.monotonic()
    try:
        async with asyncio.timeout(_OPEN_SECONDS):
            await observer.until(lambda: observer.breakers.opened > 0)
    except TimeoutError:
        screen.event("no breaker opened", "red")
    await asyncio.sleep(max(0.0, OUTAGE.total_seconds() - (time.monotonic() - began)))
    provider.behave(replace(provider.behaviour, outage=False))
    screen.event("The provider is back", "bold green")
    try:
        async with asyncio.timeout(_CLOSE_SECONDS):
            await observer.until(lambda: observer.breakers.open_now == 0)
    except TimeoutError:
        screen.event("a breaker stays open", "red")
    return Outage(observer.breakers.opened, observer.breakers.closed)


async def kill_a_worker(stage: Stage, observer: Observer, screen: Screen, wanted: int) -> Crash | None:
    """Kill the first worker that has so many calls under way; None when the jobs ran out before."""
    victim = await _find_victim(stage, observer, wanted)
    if victim is None:
        return None
    child, worker = victim
    observer.expected_to_die.add(child.pid)
    await child.kill()
    began = time.monotonic()
    await asyncio.sleep(_SETTLING_SECONDS)
    held = await ledger.holding(stage.pool, worker)
    screen.event(
        f"kill -9 {child.pid}: {child.name} is DEAD; it held {len(held.jobs)} jobs, "
        f"{held.open_calls} of them with a call under way",
        "bold red",
    )
    while (returned := await ledger.returned(stage.pool, held)) < len(held.jobs):
        if time.monotonic() - began > _RETURN_SECONDS:
            screen.event(f"only {returned} of its {len(held.jobs)} jobs came back", "red")
            return Crash(child.pid, held, returned, None)
        await asyncio.sleep(_LOOK_SECONDS)
    after = timedelta(seconds=time.monotonic() - began)
    screen.event(
        f"all {returned} jobs of the dead worker are back, {after.total_seconds():.1f} s after its death",
        "bold green",
    )
    return Crash(child.pid, held, returned, after)


async def _find_victim(stage: Stage, observer: Observer, wanted: int) -> tuple[Child, str] | None:
    while observer.now.ended < observer.now.total:
        for child in stage.workers:
            worker = await ledger.worker_of(stage.pool, child.pid)
            if worker is not None and await ledger.open_calls(stage.pool, worker) >= wanted:
                return child, worker
        await asyncio.sleep(_LOOK_SECONDS)
    return None
