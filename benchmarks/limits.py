"""How much of a provider's limits a fleet uses, and how many calls are refused: `make bench-limits`."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated
from urllib.parse import urlsplit

import machine
import typer
from aiohttp import ClientSession
from figures import Figure, progress, table
from pydantic import BaseModel
from rich.console import Console
from stage import Stage, body, open_stage

from headrace_producer import JobRequest
from headrace_shared.configuration import Configuration
from headrace_shared.store import configurations
from headrace_shared.store.pool import open_pool
from headrace_shared.testing.limits import Enforcement

_WORKERS, _SLOTS = 4, 200
_MODEL = "openai/gpt-4o-mini"
_LATENCY = 0.5
_RPM, _TPM = 3000, 1_000_000
_OTHERS = 0.3
_IDLE_SECONDS = 60
_LEFT = "SELECT count(*) FROM headrace.jobs WHERE ended_at IS NULL"


class _Total(BaseModel):
    by_status: dict[str, int]


class _Stats(BaseModel):
    total: _Total


@dataclass
class _Run:
    """A fleet at work, and the provider that keeps limits."""

    stage: Stage
    session: ClientSession
    foreign: dict[int, int] = field(default_factory=lambda: {200: 0, 429: 0})
    """How the calls of somebody else were answered who uses the same key."""

    async def control(self, what: str, changes: dict[str, object] | None = None) -> _Stats:
        method = "GET" if changes is None else "POST"
        async with self.session.request(method, f"/{what}", json=changes) as response:
            return _Stats.model_validate_json(await response.read())

    async def enqueue(self, seconds: float) -> None:
        """Enqueue more than can go out in so many seconds."""
        jobs = (JobRequest("/v1/chat/completions", {**body(n), "max_tokens": 200}) for n in range(100_000))
        count = int(_RPM / 60 * seconds * 1.3) + 500
        await self.stage.headrace.enqueue_many([next(jobs) for _ in range(count)])

    async def counts(self) -> tuple[int, int]:
        """Return the calls of the fleet that were answered, and those that were refused."""
        by_status = (await self.control("stats")).total.by_status
        return by_status.get("200", 0) - self.foreign[200], by_status.get("429", 0) - self.foreign[429]

    async def others_call(self) -> None:
        """Use a share of the limit, as somebody else with the same key."""
        async with asyncio.TaskGroup() as group:
            while True:
                group.create_task(self._other_call())
                await asyncio.sleep(60 / (_OTHERS * _RPM))

    async def _other_call(self) -> None:
        key = {"Authorization": "Bearer sk-simulated"}
        async with self.session.post("/v1/chat/completions", json=body(0), headers=key) as response:
            self.foreign[response.status] += 1


Change = Callable[[_Run], Awaitable[None]]


async def _nothing(run: _Run) -> None:
    del run


async def _halve(run: _Run) -> None:
    await run.control("behaviour", {"requests_per_minute": _RPM // 2, "tokens_per_minute": _TPM // 2})


async def _idle(run: _Run) -> None:
    """Let the fleet work off what there is, and stand still for a while."""
    while await run.stage.connection.fetchval(_LEFT):  # noqa: ASYNC110 - other processes end them
        await asyncio.sleep(0.5)
    await asyncio.sleep(_IDLE_SECONDS)


@dataclass(frozen=True, slots=True)
class Scenario:
    """What happens before the measurement, and what is expected of it."""

    enforcement: Enforcement = Enforcement.SECOND
    known: bool = True
    warm_up: int = 10
    share: float = 1
    """Of the limit, that the fleet may use."""
    others: bool = False
    change: Change = _nothing
    burst: bool = False
    at_least: float = 97
    at_most: float = 0.5
    """Refused, in per cent of calls."""


_SCENARIOS = {
    "bucket": Scenario(Enforcement.BUCKET),
    "seconds": Scenario(Enforcement.SECOND),
    "minutes": Scenario(Enforcement.MINUTE),
    "unknown": Scenario(known=False, warm_up=120, at_least=95, at_most=1),
    "halved": Scenario(share=0.5, change=_halve, at_least=92, at_most=1),
    "others": Scenario(share=1 - _OTHERS, others=True, warm_up=30, at_least=92, at_most=1),
    "burst": Scenario(change=_idle, burst=True),
}


def main(
    *,
    only: Annotated[str, typer.Option(help=f"Some of {', '.join(_SCENARIOS)}.")] = "",
    seconds: Annotated[int, typer.Option(min=10, help="How long is measured.")] = 60,
) -> None:
    """Run a fleet of four workers against a provider that keeps limits, in real time."""
    names = [name.strip() for name in only.split(",")] if only else list(_SCENARIOS)
    for name in names:
        if name not in _SCENARIOS:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(_SCENARIOS)}", param_hint="--only")
    progress(", ".join(f"{name} {value}" for name, value in machine.describe().items()))
    figures: list[Figure] = []
    for name in names:
        figures += asyncio.run(_measure(name, _SCENARIOS[name], seconds))
    Console(width=120).print(table(figures, title="Limits"))
    print(json.dumps([figure.as_json() for figure in figures]))


async def _measure(name: str, scenario: Scenario, seconds: int) -> list[Figure]:
    async with _running(scenario) as run:
        if scenario.burst:
            await run.enqueue(scenario.warm_up)
        else:
            await run.enqueue(scenario.warm_up + seconds)
        async with run.stage.workers(_WORKERS, slots=_SLOTS):
            await asyncio.sleep(scenario.warm_up)
            await scenario.change(run)
            if scenario.burst:
                await run.enqueue(seconds)
            before = await run.counts()
            progress(f"{name}: warm, {before[0]:,} answered and {before[1]:,} refused by now")
            await asyncio.sleep(seconds)
            after = await run.counts()
    answered, refused = (later - earlier for earlier, later in zip(before, after, strict=True))
    used = 100 * answered / (_RPM * scenario.share * seconds / 60)
    refusals = 100 * refused / max(1, answered + refused)
    progress(f"{name}: {used:.1f} % used, {refusals:.2f} % refused")
    return [
        Figure(name, "used of what the fleet may", used, "%", at_least=scenario.at_least),
        Figure(name, "refused", refusals, "% of calls", at_most=scenario.at_most),
    ]


@asynccontextmanager
async def _running(scenario: Scenario) -> AsyncGenerator[_Run]:
    async with open_stage(latency=_LATENCY) as stage:
        both: dict[str, object] = {"requests_per_minute": _RPM, "tokens_per_minute": _TPM}
        if scenario.known:
            document = {"limits": {_MODEL: both}}
            async with await open_pool(stage.postgres_url, size=1) as pool:
                await configurations.apply(pool, Configuration.from_document(document), "bench")
        parts = urlsplit(stage.provider_url)
        async with ClientSession(f"{parts.scheme}://{parts.netloc}") as session:
            run = _Run(stage, session)
            await run.control("behaviour", {**both, "enforcement": scenario.enforcement})
            others = asyncio.create_task(run.others_call()) if scenario.others else None
            yield run
            if others is not None:
                others.cancel()


if __name__ == "__main__":
    typer.run(main)
