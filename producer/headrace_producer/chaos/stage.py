"""Everything that a run starts and ends again: servers, provider, receivers, proxies, processes."""

import os
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from headrace_producer.chaos import load, members
from headrace_producer.chaos.canaries import Canaries
from headrace_producer.chaos.collector import SpanCollector
from headrace_producer.chaos.faults import Victim, Way
from headrace_producer.chaos.load import Orders
from headrace_producer.chaos.members import Member, Part
from headrace_producer.chaos.servers import SOURCE, Servers
from headrace_producer.chaos.work import Tenants
from headrace_producer.processes import WORKER
from headrace_producer.receivers import verifying_receiver
from headrace_shared.budgets import Budgets
from headrace_shared.configuration import Configuration, parse_toml
from headrace_shared.dispatch.connection import Redis
from headrace_shared.money import NanoUSD
from headrace_shared.store import configurations
from headrace_shared.store.money import BudgetPolicy, WindowKind
from headrace_shared.store.pool import Pool, open_pool
from headrace_shared.testing.behaviour import Behaviour
from headrace_shared.testing.fault_proxy import FaultProxy
from headrace_shared.testing.simulated_provider import SimulatedProvider
from headrace_shared.testing.webhook_receiver import WebhookReceiver

LEASE = timedelta(seconds=3)
SLOTS = 24
PRODUCERS = 2
PROVIDER = "openai"

CALM = Behaviour(latency=timedelta(milliseconds=600), jitter=0.6, output_tokens=30)
"""How the provider behaves when nothing is wrong with it."""

_TOML = """
[providers.openai]
connect_timeout = "2s"
read_timeout = "3s"
total_timeout = "6s"

[retries]
initial = "300ms"
maximum = "3s"
max_attempts = 8
floor = 100

[breaker]
minimum_calls = 6
window = "2s"
cooldown = "2s"
probe_lease = "6s"

[webhooks]
timeout = "2s"
schedule = ["0s", "1s", "1s", "2s", "2s", "4s", "4s", "8s", "8s", "8s", "15s", "15s", "30s", "30s"]
"""

_DIRECT = {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
_JOB_NANO = 18_000
"""What a job costs, about: only to let budgets run out somewhere in the middle."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How the stage is set."""

    seed: int
    seconds: float
    workers: int
    jobs_per_second: float


@dataclass(frozen=True, slots=True)
class Receiver:
    """A tenant's own, behind a proxy; it verifies with that tenant's secret."""

    tenant: str
    inner: WebhookReceiver
    proxy: FaultProxy


@dataclass(frozen=True, slots=True)
class Stage:
    """What runs, with the ways to it."""

    plan: Plan
    directory: Path
    servers: Servers
    pool: Pool
    """A way of its own to Postgres, which no fault of a network touches."""
    redis: Redis
    budgets: Budgets
    configuration: Configuration
    tenants: Tenants
    canaries: Canaries
    provider: SimulatedProvider
    receivers: tuple[Receiver, ...]
    spans: SpanCollector
    workers: tuple[Member, ...]
    producers: tuple[Member, ...]

    @property
    def ack_files(self) -> list[Path]:
        return [_ack_file(self.directory, number) for number in range(1, PRODUCERS + 1)]

    def with_way(self, way: Way) -> list[Member]:
        return [member for member in (*self.workers, *self.producers) if way in member.ways]

    def raised_limit(self) -> NanoUSD:
        """What the tenant that waits for its budget gets in the end."""
        return NanoUSD(self.first_limit() * 400)

    def first_limit(self) -> NanoUSD:
        """What half of a limited tenant's jobs cost, about."""
        return NanoUSD(round(self.plan.jobs_per_second * self.plan.seconds * 0.16 * 0.5 * _JOB_NANO))


@asynccontextmanager
async def open_stage(plan: Plan, servers: Servers, directory: Path) -> AsyncGenerator[Stage]:
    """Start everything but the producers; what was started last is ended first."""
    async with AsyncExitStack() as stack:
        pool = await open_pool(servers.postgres_url, size=6)
        stack.callback(pool.terminate)
        redis = Redis(servers.redis_url)
        stack.push_async_callback(redis.close)
        configuration = parse_toml(_TOML, "the configuration of chaos")
        await configurations.apply(pool, configuration, SOURCE)
        canaries = Canaries.new()
        tenants = Tenants.of(f"chaos-{plan.seed}-{secrets.token_hex(3)}")
        provider = await stack.enter_async_context(SimulatedProvider(CALM, record=True))
        spans = await stack.enter_async_context(SpanCollector())
        receivers = [await _receiver(tenant, canaries.master, stack) for tenant in tenants.all]
        casting = _Casting(plan, servers, _environment(canaries, spans), directory, stack)
        workers = [await casting.worker(number, provider.url) for number in range(1, plan.workers + 1)]
        producers = [
            await casting.producer(number, tenants, canaries, receivers) for number in range(1, PRODUCERS + 1)
        ]
        stack.push_async_callback(members.end_all, [*workers, *producers])
        stage = Stage(
            plan,
            directory,
            servers,
            pool,
            redis,
            Budgets(pool, redis),
            configuration,
            tenants,
            canaries,
            provider,
            tuple(receivers),
            spans,
            tuple(workers),
            tuple(producers),
        )
        if servers.own is None:
            stack.push_async_callback(_remove_budgets, stage)
        await _set_budgets(stage)
        for worker in workers:
            await worker.start()
        yield stage


async def _set_budgets(stage: Stage) -> None:
    first = stage.first_limit()
    for tenant, policy in (
        (stage.tenants.waits, BudgetPolicy.WAIT),
        (stage.tenants.rejected, BudgetPolicy.REJECT),
    ):
        await stage.budgets.set(f"tenant:{tenant}", WindowKind.TOTAL, first, policy)
    await stage.budgets.set(
        f"tenant:{stage.tenants.free}", WindowKind.TOTAL, stage.raised_limit(), BudgetPolicy.WAIT
    )


async def _remove_budgets(stage: Stage) -> None:
    """Leave no rule behind on servers that are not chaos' own."""
    for tenant in (stage.tenants.waits, stage.tenants.rejected, stage.tenants.free):
        await stage.budgets.remove(f"tenant:{tenant}", WindowKind.TOTAL)


async def _receiver(tenant: str, master: str, stack: AsyncExitStack) -> Receiver:
    inner = await stack.enter_async_context(verifying_receiver(tenant, master))
    return Receiver(tenant, inner, await stack.enter_async_context(FaultProxy(inner.url)))


def _environment(canaries: Canaries, spans: SpanCollector) -> dict[str, str]:
    outer = {name: value for name, value in os.environ.items() if not name.startswith(("HEADRACE_", "OTEL_"))}
    return {
        **outer,
        **_DIRECT,
        "HEADRACE_CONCURRENCY": str(SLOTS),
        "HEADRACE_LEASE_SECONDS": str(LEASE.total_seconds()),
        "HEADRACE_DRAIN_SECONDS": "3",
        "HEADRACE_WEBHOOK_SECRET": canaries.master,
        "HEADRACE_WEBHOOK_ALLOW_HTTP": "1",
        "HEADRACE_WEBHOOK_ALLOWED_NETWORKS": "127.0.0.0/8",
        "OPENAI_API_KEY": canaries.api_key,
        "OTEL_EXPORTER_OTLP_ENDPOINT": spans.url,
    }


@dataclass(frozen=True, slots=True)
class _Casting:
    """Makes the processes of a run, each with ways of its own, and starts none."""

    plan: Plan
    servers: Servers
    environment: Mapping[str, str]
    """Of all of them."""
    directory: Path
    stack: AsyncExitStack

    async def worker(self, number: int, provider_url: str) -> Member:
        ways = {
            Way.WORKER_POSTGRES: await self._way(self.servers.postgres_url),
            Way.WORKER_REDIS: await self._way(self.servers.redis_url),
            Way.WORKER_PROVIDER: await self._way(provider_url),
        }
        own = {
            "HEADRACE_POSTGRES_URL": ways[Way.WORKER_POSTGRES].url,
            "HEADRACE_REDIS_URL": ways[Way.WORKER_REDIS].url,
            "OPENAI_BASE_URL": ways[Way.WORKER_PROVIDER].url,
        }
        return Member(Victim.WORKER, number, Part(WORKER, {**self.environment, **own}, ways), self.directory)

    async def producer(
        self, number: int, tenants: Tenants, canaries: Canaries, receivers: Sequence[Receiver]
    ) -> Member:
        ways = {
            Way.PRODUCER_POSTGRES: await self._way(self.servers.postgres_url),
            Way.PRODUCER_REDIS: await self._way(self.servers.redis_url),
        }
        orders = Orders(
            seed=self.plan.seed,
            producer=number,
            run=tenants.run,
            canary=canaries.word,
            asks_per_second=self.plan.jobs_per_second / PRODUCERS,
            acks=_ack_file(self.directory, number),
            hooks={receiver.tenant: receiver.proxy.url for receiver in receivers},
        )
        own = {
            "HEADRACE_POSTGRES_URL": ways[Way.PRODUCER_POSTGRES].url,
            "HEADRACE_REDIS_URL": ways[Way.PRODUCER_REDIS].url,
            load.VARIABLE: orders.model_dump_json(),
        }
        part = Part(load.COMMAND, {**self.environment, **own}, ways)
        return Member(Victim.PRODUCER, number, part, self.directory)

    async def _way(self, url: str) -> FaultProxy:
        return await self.stack.enter_async_context(FaultProxy(url))


def _ack_file(directory: Path, number: int) -> Path:
    return directory / f"producer-{number}.acks"
