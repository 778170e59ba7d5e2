"""A run from the first process to the audit."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from headrace_producer.beside import beside
from headrace_producer.chaos import members, records
from headrace_producer.chaos.auditor import audit
from headrace_producer.chaos.evidence import Calm, Evidence, collect
from headrace_producer.chaos.faults import Fault, Victim
from headrace_producer.chaos.injector import Injector
from headrace_producer.chaos.report import Report
from headrace_producer.chaos.schedule import Event, schedule
from headrace_producer.chaos.screen import Screen
from headrace_producer.chaos.servers import open_servers
from headrace_producer.chaos.stage import PRODUCERS, Plan, Stage, open_stage
from headrace_producer.chaos.watcher import Watcher
from headrace_producer.chaos.work import TENANTS
from headrace_shared.errors import HeadraceError
from headrace_shared.money import NanoUSD
from headrace_shared.settings import Settings
from headrace_shared.store.money import BudgetPolicy, WindowKind
from headrace_shared.store.pool import UNREACHABLE

_START_SECONDS = 40.0
_DRAIN_SECONDS = 180.0
_RAISED_AFTER = 0.7
"""When the tenant that waits for its budget gets more: this share of the run."""
_POLL_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Options:
    """What is asked for."""

    seed: int
    minutes: float
    faults: Sequence[Fault]
    workers: int
    jobs_per_second: float

    @property
    def seconds(self) -> float:
        return self.minutes * 60

    def events(self) -> tuple[Event, ...]:
        """Return what is done when: the same for the same options."""
        victims = {Victim.WORKER: self.workers, Victim.PRODUCER: PRODUCERS, Victim.RECEIVER: TENANTS}
        return schedule(self.seed, self.seconds, self.faults, victims)


async def perform(options: Options, settings: Settings, directory: Path, screen: Screen) -> Report:
    """Run everything in a directory, and end all that was started."""
    # Its pool says with a stack, and again and again, that a server is away; who made it so knows.
    logging.getLogger("asyncpg").setLevel(logging.CRITICAL)
    plan = Plan(options.seed, options.seconds, options.workers, options.jobs_per_second)
    async with open_servers(settings, directory) as servers:
        screen.event("the servers run" if servers.own else "the given servers answer")
        async with open_stage(plan, servers, directory) as stage:
            await _until_registered(stage)
            screen.event(
                f"{plan.workers} workers run: pid {', '.join(str(one.pid) for one in stage.workers)}"
            )
            watcher = Watcher(stage, screen)
            injector = Injector(stage, watcher, screen)
            evidence = await beside(watcher.run(), _through(stage, options, watcher, injector, screen))
    return _report(options, injector, evidence)


async def _through(
    stage: Stage, options: Options, watcher: Watcher, injector: Injector, screen: Screen
) -> Evidence:
    began = time.monotonic()
    for producer in stage.producers:
        await producer.start()
    raising = asyncio.create_task(_raise_budget(stage, options.seconds * _RAISED_AFTER, screen))
    await injector.run(options.events())
    await asyncio.sleep(max(0.0, began + options.seconds - time.monotonic()))
    await raising
    screen.event("the last fault is over: no more jobs, everything is to drain")
    await members.end_all(stage.producers)
    calm = await _drain(stage, watcher)
    screen.event("drained" if calm.drained else f"NOT drained: {calm.standing}")
    return await collect(stage, watcher.seen, calm)


async def _drain(stage: Stage, watcher: Watcher) -> Calm:
    """Wait until every job and callback has ended and nothing is held; nobody is helped any more."""
    workers = [worker.pid for worker in stage.workers]
    held = 0

    async def is_over() -> bool:
        nonlocal held
        held = await _held(stage)
        return watcher.progress.is_drained and not held

    await watcher.recovered()
    watcher.forget_progress()
    drained = await _wait(is_over, _DRAIN_SECONDS)
    accidents = [
        f"{member.name} {accident}"
        for member in (*stage.workers, *stage.producers)
        for accident in member.accidents
    ]
    if [worker.pid for worker in stage.workers] != workers:
        accidents.append("a worker was started again after the last fault")
    return Calm(drained, watcher.progress.in_words, held, accidents)


async def _held(stage: Stage) -> int:
    try:
        return sum(view.held for view in await stage.budgets.view())
    except (HeadraceError, *UNREACHABLE):
        return 1


async def _raise_budget(stage: Stage, after: float, screen: Screen) -> None:
    """Give the tenant that waits more; an operator would try again, too, while a server is away."""
    await asyncio.sleep(after)
    scope = f"tenant:{stage.tenants.waits}"
    while True:
        try:
            await stage.budgets.set(scope, WindowKind.TOTAL, stage.raised_limit(), BudgetPolicy.WAIT)
        except (HeadraceError, *UNREACHABLE):
            await asyncio.sleep(1)
        else:
            screen.event("the budget of the tenant that waits for it is raised")
            return


async def _until_registered(stage: Stage) -> None:
    async def are_there() -> bool:
        for worker in stage.workers:
            worker.check()
        return await records.count_workers(stage.pool) >= len(stage.workers)

    if not await _wait(are_there, _START_SECONDS):
        raise TimeoutError("the workers did not start in time")


async def _wait(condition: Callable[[], Awaitable[bool]], seconds: float) -> bool:
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        if await condition():
            return True
        await asyncio.sleep(_POLL_SECONDS)
    return False


def _report(options: Options, injector: Injector, evidence: Evidence) -> Report:
    return Report(
        seed=options.seed,
        minutes=options.minutes,
        done=injector.done,
        not_done=injector.not_done,
        jobs=len(evidence.jobs),
        calls=len(evidence.booked),
        callbacks=len(evidence.received),
        cost=NanoUSD(sum(call.cost for call in evidence.calls)),
        suspense=NanoUSD(sum(call.suspense for call in evidence.calls)),
        busiest=(
            max((log.busiest for log in evidence.logs), default=0),
            max(evidence.seen.dials.values(), default=0),
        ),
        standstill=evidence.seen.standstill,
        findings=audit(evidence),
    )
