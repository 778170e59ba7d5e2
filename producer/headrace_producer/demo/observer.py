"""Watches a run from outside: how far it is, its budgets, its breakers."""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from headrace_producer.demo import ledger
from headrace_producer.demo.ledger import Progress
from headrace_producer.demo.screen import Screen
from headrace_producer.demo.stage import Stage
from headrace_shared.dispatch import keys
from headrace_shared.money import ZERO, NanoUSD
from headrace_shared.routes import Target

_LOOK_SECONDS = 0.05
_COUNT_SECONDS = 0.25
STALL_SECONDS = 100.0


class Stalled(Exception):
    """Nothing has moved for too long."""


@dataclass(slots=True)
class BreakerLog:
    """What was seen of the breakers."""

    opened: int = 0
    probed: int = 0
    closed: int = 0
    open_now: int = 0


class Observer:
    """Looks at a run again and again, shows what it sees, and lets others wait for it."""

    def __init__(self, stage: Stage, screen: Screen, targets: tuple[Target, ...]) -> None:
        self.breakers = BreakerLog()
        self.over_budget = 0
        """Looks at which settled + held + suspense was more than a limit."""
        self.held = ZERO
        self.expected_to_die: set[int] = set()
        """The pids of workers whose end is no accident."""
        self.now = Progress(0, 0, 0, 0, 0, 0, 0, ZERO, ZERO)
        self._stage = stage
        self._screen = screen
        self._seen: dict[Target, Mapping[str, str]] = {target: {} for target in targets}
        self._looked = asyncio.Condition()
        self._moved = time.monotonic()

    async def run(self) -> None:
        """Look until cancelled."""
        counted = 0.0
        while True:
            await self._look_at_breakers()
            if time.monotonic() - counted >= _COUNT_SECONDS:
                await self._look_at_jobs()
                counted = time.monotonic()
            async with self._looked:
                self._looked.notify_all()
            await asyncio.sleep(_LOOK_SECONDS)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition on what is seen holds."""
        async with self._looked:
            await self._looked.wait_for(condition)

    async def look(self) -> None:
        """Look at jobs and budgets once, now."""
        await self._look_at_jobs()

    async def _look_at_jobs(self) -> None:
        for worker in self._stage.workers:
            if worker.pid not in self.expected_to_die:
                worker.check()
        now = await ledger.progress(self._stage.pool)
        if now.ended != self.now.ended or now.running != self.now.running:
            self._moved = time.monotonic()
        elif now.ended < now.total and time.monotonic() - self._moved > STALL_SECONDS:
            raise Stalled(f"nothing has moved for {STALL_SECONDS:.0f} s at {now.ended}/{now.total} jobs")
        self.now = now
        budgets = await self._stage.budgets.view()
        self.over_budget += any(budget.remaining < 0 for budget in budgets)
        self.held = NanoUSD(sum(budget.held for budget in budgets))
        self._screen.progress(now)

    async def _look_at_breakers(self) -> None:
        for target, before in self._seen.items():
            now = await self._stage.dispatch.redis.hash(keys.breaker(str(target)))
            await self._compare(target, before, now)
            self._seen[target] = now
        self.breakers.open_now = sum(one.get("state") == "open" for one in self._seen.values())

    async def _compare(self, target: Target, before: Mapping[str, str], now: Mapping[str, str]) -> None:
        was_open, is_open = before.get("state") == "open", now.get("state") == "open"
        if is_open and not was_open:
            self.breakers.opened += 1
            gates = len(await self._stage.dispatch.gates())
            self._screen.event(
                f"breaker {target} OPENED: its jobs stay in their queues ({gates} gates closed)", "yellow"
            )
        elif is_open and before.get("reopen_at") != now.get("reopen_at"):
            self.breakers.probed += 1
            self._screen.event(f"breaker {target}: one probe failed, it stays open", "yellow")
        elif is_open and now.get("probe") and before.get("probe") != now.get("probe"):
            self.breakers.probed += 1
            self._screen.event(f"breaker {target}: one job probes", "yellow")
        elif was_open and not is_open:
            self.breakers.closed += 1
            self._screen.event(f"breaker {target} CLOSED: the probe was answered", "green")
