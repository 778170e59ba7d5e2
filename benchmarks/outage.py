"""An outage of the provider under a steady load, from four workers: `make bench-outage`.

The load is 50 jobs a second, so that as many jobs as were asked for arrive while the provider is
down: 30,000 are ten minutes.
"""

import asyncio
import time
from datetime import timedelta

from figures import Figure, progress
from stage import Stage, open_stage, requests

from headrace_shared.configuration import Configuration
from headrace_shared.dispatch import breakers
from headrace_shared.dispatch.connection import Redis
from headrace_shared.routes import Target
from headrace_shared.testing.behaviour import Behaviour
from headrace_shared.testing.simulated_provider import SimulatedProvider

_RATE = 50
_WORKERS, _SLOTS = 4, 50
_CALM = Behaviour(latency=timedelta(milliseconds=200))
_DOWN = Behaviour(outage=True)
_BEFORE_SECONDS = 10
_SETTLED_SECONDS = 2
"""After so long an open breaker is known everywhere, and what was under way has come back."""
_TARGET = Target("openai", "gpt-4o-mini")

_LOOK_SECONDS = 0.1
_PATIENCE_SECONDS = 1800
_LEFT = "SELECT count(*) FROM headrace.jobs WHERE ended_at IS NULL"
_UNHAPPY = "SELECT count(*) FROM headrace.jobs WHERE state <> 'succeeded'"


class _Watch:
    """When requests arrived, and when answers left, as far as a look each tenth of a second tells."""

    def __init__(self, provider: SimulatedProvider) -> None:
        self._provider = provider
        self.arrivals: list[tuple[float, int]] = []
        self.answers: list[tuple[float, int]] = []

    async def run(self) -> None:
        while True:
            now, total = time.monotonic(), self._provider.books.total
            self.arrivals.append((now, total.requests))
            self.answers.append((now, total.answered))
            await asyncio.sleep(_LOOK_SECONDS)

    def most_within(self, seconds: float, begin: float, end: float) -> int:
        """Return the most requests that arrived in any span of this length."""
        seen = [(at, count) for at, count in self.arrivals if begin <= at <= end]
        return max(
            (last - first for at, first in seen for then, last in seen if 0 <= then - at < seconds), default=0
        )

    def full_rate_at(self, begin: float) -> float:
        """Return when nine tenths of the jobs that arrive in a second were answered in one."""
        seen = [(at, count) for at, count in self.answers if at >= begin]
        found = (
            then
            for at, first in seen
            for then, last in seen
            if 0 < then - at <= 1 and last - first >= 0.9 * _RATE
        )
        return min(found, default=float("inf"))


async def measure(jobs: int) -> list[Figure]:
    seconds = jobs / _RATE
    cooldown = Configuration.default().breaker_policy().cooldown.total_seconds()
    name = f"provider down for {seconds:.0f} s"
    async with SimulatedProvider(_CALM) as provider, open_stage() as stage:
        watch = _Watch(provider)
        async with stage.workers(_WORKERS, slots=_SLOTS, provider_url=provider.url):
            watching = asyncio.create_task(watch.run())
            await _load(stage, _BEFORE_SECONDS)
            before, down = provider.books.total.requests, time.monotonic()
            progress(f"{name}: down")
            provider.behave(_DOWN)
            opening = asyncio.create_task(_opened(stage))
            await _load(stage, seconds)
            up, during = time.monotonic(), provider.books.total.requests - before
            provider.behave(_CALM)
            progress(f"{name}: up again")
            await _until_ended(stage)
            watching.cancel()
        asked = _BEFORE_SECONDS * _RATE + round(seconds) * _RATE
        opened = await opening
        probes = watch.most_within(cooldown, opened + _SETTLED_SECONDS, up)
        back = watch.full_rate_at(up) - up
        unhappy = int(await stage.connection.fetchval(_UNHAPPY))
        amplification = provider.books.total.requests / asked
        return [
            Figure(name, "jobs", asked, "jobs"),
            Figure(name, "until its breaker was open", opened - down, "s"),
            Figure(name, "calls while it was down", during, "calls"),
            Figure(name, "calls / jobs", amplification, "x", at_most=1.1),
            Figure(name, f"most probes within a cooldown of {cooldown:.0f} s", probes, "calls", at_most=1),
            Figure(name, "until the full rate is back", back, "s", at_most=2 * cooldown),
            Figure(name, "jobs that did not succeed", unhappy, "jobs", at_most=0),
        ]


async def _opened(stage: Stage) -> float:
    """Return when the fleet's breaker was open."""
    window, redis = Configuration.default().breaker.window, Redis(stage.redis_url)
    while not (await breakers.view(redis, _TARGET, window)).is_open:  # noqa: ASYNC110 - the fleet opens it
        await asyncio.sleep(_LOOK_SECONDS)
    await redis.close()
    return time.monotonic()


async def _load(stage: Stage, seconds: float) -> None:
    began = time.monotonic()
    for second in range(round(seconds)):
        await stage.headrace.enqueue_many(requests(_RATE))
        await asyncio.sleep(max(0.0, began + second + 1 - time.monotonic()))


async def _until_ended(stage: Stage) -> None:
    async with asyncio.timeout(_PATIENCE_SECONDS):
        while True:
            if not await stage.connection.fetchval(_LEFT):
                return
            await asyncio.sleep(0.5)
