"""How much of a provider's limits a fleet uses, and how many calls are refused: `make bench-limits`."""

import asyncio
import json
from typing import Annotated
from urllib.parse import urlsplit

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


class _Total(BaseModel):
    by_status: dict[str, int]


class _Stats(BaseModel):
    total: _Total


def main(
    *,
    enforcement: Annotated[
        Enforcement, typer.Option(help="How the provider keeps its limits.")
    ] = Enforcement.SECOND,
    rpm: Annotated[int, typer.Option(min=60, help="Requests a minute.")] = 3000,
    tpm: Annotated[int, typer.Option(min=1000, help="Tokens a minute.")] = 1_000_000,
    seconds: Annotated[int, typer.Option(min=10, help="How long is measured.")] = 60,
    warm_up: Annotated[int, typer.Option(min=0, help="Seconds before that.")] = 10,
    unknown: Annotated[bool, typer.Option("--unknown", help="The fleet has to learn them.")] = False,
) -> None:
    """Run a fleet of four workers against a provider that keeps limits."""
    figures = asyncio.run(_measure(enforcement, rpm, tpm, seconds, warm_up, known=not unknown))
    Console(width=120).print(table(figures))
    print(json.dumps([figure.as_json() for figure in figures]))


async def _measure(
    enforcement: Enforcement, rpm: int, tpm: int, seconds: int, warm_up: int, *, known: bool
) -> list[Figure]:
    async with open_stage(latency=_LATENCY) as stage:
        both = {"requests_per_minute": rpm, "tokens_per_minute": tpm}
        if known:
            limited = Configuration.from_document({"limits": {_MODEL: both}})
            async with await open_pool(stage.postgres_url, size=1) as pool:
                await configurations.apply(pool, limited, "bench")
        await _control(stage, "behaviour", {**both, "enforcement": enforcement})
        count = int(rpm / 60 * (seconds + warm_up) * 1.3) + 500
        await stage.headrace.enqueue_many(
            [
                JobRequest("/v1/chat/completions", {**body(number), "max_tokens": 200})
                for number in range(count)
            ]
        )
        async with stage.workers(_WORKERS, slots=_SLOTS):
            await asyncio.sleep(warm_up)
            before = await _stats(stage)
            progress(f"{enforcement}: warm, {before}")
            await asyncio.sleep(seconds)
            after = await _stats(stage)
    answered, refused = (later - earlier for earlier, later in zip(before, after, strict=True))
    name = f"{enforcement}, {rpm:,} RPM, {'known' if known else 'unknown'}"
    return [
        Figure(name, "used", 100 * answered / (rpm * seconds / 60), "%", at_least=97 if known else 95),
        Figure(name, "refused", 100 * refused / max(1, answered + refused), "%", at_most=0.5 if known else 1),
    ]


async def _stats(stage: Stage) -> tuple[int, int]:
    counts = (await _control(stage, "stats", None)).total.by_status
    return counts.get("200", 0), counts.get("429", 0)


async def _control(stage: Stage, what: str, changes: dict[str, object] | None) -> _Stats:
    parts = urlsplit(stage.provider_url)
    async with ClientSession(f"{parts.scheme}://{parts.netloc}") as session:
        method = "GET" if changes is None else "POST"
        async with session.request(method, f"/{what}", json=changes) as response:
            return _Stats.model_validate_json(await response.read())


if __name__ == "__main__":
    typer.run(main)
