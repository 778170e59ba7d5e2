"""A fleet with everything at once, for tests: what happens to it is drawn from a seed.

Two providers that keep limits and fail at times, tenants with weights and caps, budgets that overlap,
and in between an outage of each, pauses, cancels, limits that are raised, a worker that is replaced.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from random import Random
from typing import TypeAlias
from uuid import UUID

from command_line import Command

from headrace_producer import Headrace, JobRequest
from headrace_shared.budgets import Budgets
from headrace_shared.money import NanoUSD
from headrace_shared.pauses import Pauses
from headrace_shared.store.money import BudgetPolicy, WindowKind
from headrace_shared.testing.behaviour import Behaviour
from headrace_shared.testing.jobs import Jobs
from headrace_shared.testing.limits import Enforcement
from headrace_shared.testing.simulated_provider import SimulatedProvider
from headrace_workers.testing import running_worker

MOST = 20
"""Tokens that an answer has at most."""
DEAR = MOST * 10_000
"""Nano-USD that a call of the dearest model costs at most."""
ENOUGH = NanoUSD(10**12)

CONCURRENT = {"openai": 6, "b": 2}
CAPS = {"a": 3, "c": 1}
LANES = ("interactive", "default", "batch")
TENANTS = ("a", "b", "c", "d")
ROUTES = ("main", "main", "main", "pair", "pair", "solo")
TAGS = ((), (), ("red",), ("spent",), ("tomorrow",), ("soft", "red"), ("soft", "tomorrow"))
WAITS_FOR_TOMORROW = "tomorrow"

BUDGETS: Mapping[str, tuple[WindowKind, int, BudgetPolicy]] = {
    "global": (WindowKind.DAY, 16 * DEAR, BudgetPolicy.WAIT),
    "tenant:b": (WindowKind.DAY, 4 * DEAR, BudgetPolicy.WAIT),
    "tenant:d": (WindowKind.DAY, ENOUGH, BudgetPolicy.WAIT),
    "model:solo": (WindowKind.DAY, 2 * DEAR, BudgetPolicy.WAIT),
    "model:main": (WindowKind.TOTAL, 20 * DEAR, BudgetPolicy.DOWNGRADE),
    "key:ci": (WindowKind.WEEK, ENOUGH, BudgetPolicy.WAIT),
    "tag:red": (WindowKind.TOTAL, 7 * DEAR, BudgetPolicy.REJECT),
    "tag:spent": (WindowKind.TOTAL, 5 * DEAR, BudgetPolicy.WAIT),
    "tag:tomorrow": (WindowKind.DAY, 7 * DEAR, BudgetPolicy.WAIT),
    "tag:soft": (WindowKind.DAY, 1, BudgetPolicy.SOFT),
}
RAISED = ("global", "tenant:b", "model:solo")
LOWERED = "tenant:d"
"""For a time, to what it has spent already: nothing of it goes then."""
PAUSED = ("lane:batch", "tenant:a", "model:pair", "global")


@dataclass(frozen=True, slots=True)
class Enqueue:
    requests: tuple[JobRequest, ...]


@dataclass(frozen=True, slots=True)
class Pause:
    """Jobs of a scope are kept back or, where it is over, go on."""

    scope: str
    is_over: bool = False


@dataclass(frozen=True, slots=True)
class Outage:
    """A provider answers nothing but 503 or, where it is over, what it did before."""

    provider: str
    is_over: bool = False


@dataclass(frozen=True, slots=True)
class Limit:
    """A budget has another limit from now on."""

    scope: str
    amount: int


@dataclass(frozen=True, slots=True)
class Cancel:
    places: tuple[float, ...]
    """Which of the jobs that are there by then, from 0 to 1."""


@dataclass(frozen=True, slots=True)
class Replace:
    """A worker stops, and another one starts."""


@dataclass(frozen=True, slots=True)
class Submit:
    """A batch that has the money of one request at a time."""


Step: TypeAlias = Enqueue | Submit | Pause | Outage | Limit | Cancel | Replace


def schedule(seed: int) -> list[Step]:
    """Return what happens, in its order: whatever is stopped goes on before the end."""
    random = Random(seed)  # noqa: S311 - repeatable on purpose
    steps: list[tuple[float, Step]] = [(n / 8, Enqueue(_requests(random, n))) for n in range(8)]
    stops: list[tuple[type[Pause | Outage], str]] = [(Pause, scope) for scope in PAUSED]
    stops += [(Outage, provider) for provider in CONCURRENT]
    for kind, what in stops:
        begins = random.uniform(0.05, 0.8)
        steps += [(begins, kind(what)), (begins + random.uniform(0.05, 0.4), kind(what, is_over=True))]
    steps += [(random.uniform(0.15, 0.4), Limit(LOWERED, DEAR))]
    steps += [(random.uniform(0.45, 1.2), Limit(scope, ENOUGH)) for scope in (*RAISED, LOWERED)]
    steps += [(random.random(), Cancel(tuple(random.random() for _ in range(4)))) for _ in range(3)]
    steps += [(random.random(), one) for one in (Replace(), Replace(), Submit())]
    return [step for _, step in sorted(steps, key=lambda one: one[0])]


def _requests(random: Random, wave: int) -> tuple[JobRequest, ...]:
    return tuple(_request(random, f"{wave}-{number}") for number in range(12))


def _request(random: Random, name: str) -> JobRequest:
    shares = random.random() < 0.3
    text = f"shared {random.randrange(2)} of {name.partition('-')[0]}" if shares else name
    return JobRequest(
        "/v1/chat/completions",
        {
            "model": random.choice(ROUTES),
            "max_completion_tokens": MOST,
            "messages": [{"role": "user", "content": text}],
        },
        tenant=random.choice(TENANTS),
        lane=random.choice(LANES),
        tags=random.choice(TAGS),
        api_key=random.choice((None, "ci")),
        max_cost=random.choice((None, None, None, "0.0001", "0.0002", "0.0005")),
        share=shares,
    )


def configuration(urls: Mapping[str, str]) -> Mapping[str, object]:
    """Return limits, routes, prices and caps for these providers; what is waited for is short."""
    fallback = {"on": ["down", "rate_limited"], "provider": "b", "model": "small"}
    return {
        "providers": {name: {"base_url": url, "api_key": "none"} for name, url in urls.items()},
        "routes": {
            "main": {"targets": [{"provider": "openai", "model": "large"}], "fallbacks": [fallback]},
            "pair": {"targets": [{"provider": name, "model": "small"} for name in urls]},
            "solo": {"targets": [{"provider": "openai", "model": "solo"}]},
        },
        "prices": {
            "openai/large": {"input": "0", "output": "10"},
            "openai/solo": {"input": "0", "output": "5"},
            **{f"{name}/small": {"input": "0", "output": "1"} for name in urls},
        },
        "limits": {
            **{name: {"concurrent": most} for name, most in CONCURRENT.items()},
            "openai/large": {"requests_per_minute": 1500, "tokens_per_minute": 80_000, "concurrent": 3},
            "openai/solo": {"requests_per_minute": 900, "concurrent": 1},
        },
        "tenants": {
            "a": {"weight": 5, "concurrent": CAPS["a"]},
            "b": {"weight": 2},
            "c": {"concurrent": CAPS["c"]},
        },
        "retries": {"initial": "5ms", "maximum": "20ms", "max_attempts": 30, "budget": 1.0},
        "defaults": {"suspense_after": "720h"},
        "breaker": {"minimum_calls": 6, "window": "3s", "cooldown": "300ms", "probe_lease": "2s"},
    }


def behaviour(provider: str, seed: int) -> Behaviour:
    """Return how a provider behaves while it is up: it keeps limits, and one answer in twenty goes wrong."""
    return Behaviour(
        latency=timedelta(milliseconds=25),
        jitter=0.8,
        server_error=0.03,
        cut=0.01,
        garbage=0.01,
        output_tokens=14,
        requests_per_minute=1500 if provider == "openai" else 2400,
        tokens_per_minute=80_000,
        enforcement=Enforcement.SECOND if provider == "openai" else Enforcement.BUCKET,
        seed=seed,
    )


@dataclass
class Fleet:
    """What a schedule is done to."""

    seed: int
    jobs: Jobs
    client: Headrace
    budgets: Budgets
    pauses: Pauses
    command: Command
    providers: Mapping[str, SimulatedProvider]
    workers: list[AsyncExitStack] = field(default_factory=list[AsyncExitStack])
    ids: list[str] = field(default_factory=list[str])

    async def act(self, step: Step) -> None:
        match step:
            case Enqueue(requests):
                self.ids += [str(job.id) for job in await self.client.enqueue_many(requests)]
            case Submit():
                done = await self.command.submit(4, "--max-cost", "0.0007", "--json")
                found = "SELECT id FROM headrace.jobs WHERE batch_id = $1"
                rows = await self.jobs.pool.fetch(found, UUID(str(done.answer["batch_id"])))
                self.ids += [str(row["id"]) for row in rows]
            case Pause(scope, is_over):
                await (self.pauses.resume(scope) if is_over else self.pauses.pause(scope))
            case Outage(name, is_over):
                usual = behaviour(name, self.seed)
                self.providers[name].behave(usual if is_over else Behaviour(outage=True))
            case Limit(scope, amount):
                kind, _, policy = BUDGETS[scope]
                await self.budgets.set(scope, kind, NanoUSD(amount), policy)
            case Cancel(places):
                for place in places:
                    await self.client.cancel(self.ids[int(place * len(self.ids))])
            case Replace():
                await self.start_worker()
                await self.workers.pop(0).aclose()

    async def start_worker(self) -> None:
        worker = AsyncExitStack()
        await worker.enter_async_context(running_worker(concurrency=6, lease_seconds=60))
        self.workers.append(worker)

    async def some_calls(self, count: int = 4) -> None:
        """Wait for some more calls, or for a moment when nobody calls."""
        arrived = [provider.books.until(_more(provider, count)) for provider in self.providers.values()]
        waits = [asyncio.ensure_future(one) for one in arrived]
        await asyncio.wait(waits, timeout=0.1, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)


def _more(provider: SimulatedProvider, count: int) -> "_More":
    return _More(provider, provider.books.total.requests + count)


@dataclass(frozen=True, slots=True)
class _More:
    provider: SimulatedProvider
    requests: int

    def __call__(self) -> bool:
        return self.provider.books.total.requests >= self.requests


@asynccontextmanager
async def fleet(seed: int, jobs: Jobs, budgets: Budgets, command: Command) -> AsyncGenerator[Fleet]:
    """Three workers, two providers and their budgets."""
    async with AsyncExitStack() as stack:
        providers = {
            name: await stack.enter_async_context(SimulatedProvider(behaviour(name, seed), record=True))
            for name in CONCURRENT
        }
        await jobs.configure(configuration({name: one.url for name, one in providers.items()}))
        for scope, (kind, limit, policy) in BUDGETS.items():
            await budgets.set(scope, kind, NanoUSD(limit), policy)
        client = await stack.enter_async_context(Headrace())
        made = Fleet(seed, jobs, client, budgets, Pauses(jobs.pool, jobs.dispatch), command, providers)
        try:
            for _ in range(3):
                await made.start_worker()
            yield made
        finally:
            for worker in made.workers:
                await worker.aclose()
