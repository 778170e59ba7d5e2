"""Everything that the demo starts, and ends again: servers, receivers, workers, a client."""

import asyncio
import os
import secrets
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from headrace_producer import Headrace
from headrace_producer.demo.fleet import workers
from headrace_producer.demo.ledger import worker_of
from headrace_producer.demo.screen import Screen
from headrace_producer.processes import Child
from headrace_producer.receivers import verifying_receiver
from headrace_shared.budgets import Budgets
from headrace_shared.configuration import Configuration, parse_toml
from headrace_shared.dispatch.connection import Redis
from headrace_shared.dispatch.dispatch import Dispatch
from headrace_shared.embedded import EmbeddedServers
from headrace_shared.servers import own_servers
from headrace_shared.settings import load_settings
from headrace_shared.store import configurations
from headrace_shared.store.pool import Pool, open_pool
from headrace_shared.testing.webhook_receiver import WebhookReceiver

_START_SECONDS = 30.0
_POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Plan:
    """How the stage is set."""

    toml: str
    """The headrace.toml that is applied."""
    tenants: tuple[str, ...]
    workers: int
    slots: int
    """Jobs that one worker runs at a time."""
    lease_seconds: float
    provider_environment: Mapping[str, str]
    """OPENAI_API_KEY and the like, as the workers are to have them."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What runs, with the ways to it."""

    directory: Path
    pool: Pool
    dispatch: Dispatch
    budgets: Budgets
    configuration: Configuration
    client: Headrace
    receivers: Mapping[str, WebhookReceiver]
    """Each tenant's own; it verifies with that tenant's secret."""
    workers: tuple[Child, ...]


@asynccontextmanager
async def open_stage(plan: Plan, directory: Path, screen: Screen) -> AsyncGenerator[Stage]:
    """Start everything in a directory of its own; what was started last is ended first."""
    async with AsyncExitStack() as stack:
        began = time.monotonic()
        servers = await stack.enter_async_context(own_servers(directory))
        screen.event(f"PostgreSQL and Valkey run, the schema is in place ({time.monotonic() - began:.1f} s)")
        pool = await open_pool(servers.postgres_url)
        stack.push_async_callback(pool.close)
        redis = Redis(servers.redis_url)
        stack.push_async_callback(redis.close)
        configuration = parse_toml(plan.toml, "the demo's headrace.toml")
        await configurations.apply(pool, configuration, "headrace demo")
        master = secrets.token_hex(32)
        receivers = {
            tenant: await stack.enter_async_context(verifying_receiver(tenant, master))
            for tenant in plan.tenants
        }
        environment = _environment(plan, servers, master)
        fleet = await stack.enter_async_context(workers(plan.workers, environment, directory))
        client = await stack.enter_async_context(_client(servers))
        stage = Stage(
            directory, pool, Dispatch(redis), Budgets(pool, redis), configuration, client, receivers, fleet
        )
        await _until_all_registered(stage)
        pids = " and ".join(str(worker.pid) for worker in fleet)
        screen.event(f"{plan.workers} worker(s) of {plan.slots} slots run: pid {pids}")
        yield stage


def _client(servers: EmbeddedServers) -> Headrace:
    settings = load_settings(
        postgres_url=servers.postgres_url,
        redis_url=servers.redis_url,
        pooler=False,
        webhook_allow_http=True,
        webhook_allowed_networks="127.0.0.0/8",
    )
    return Headrace(settings=settings)


def _environment(plan: Plan, servers: EmbeddedServers, master: str) -> dict[str, str]:
    outer = {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")}
    return {
        **outer,
        "HEADRACE_POSTGRES_URL": servers.postgres_url,
        "HEADRACE_REDIS_URL": servers.redis_url,
        "HEADRACE_CONCURRENCY": str(plan.slots),
        "HEADRACE_LEASE_SECONDS": str(plan.lease_seconds),
        "HEADRACE_DRAIN_SECONDS": "3",
        "HEADRACE_WEBHOOK_SECRET": master,
        "HEADRACE_WEBHOOK_ALLOW_HTTP": "1",
        "HEADRACE_WEBHOOK_ALLOWED_NETWORKS": "127.0.0.0/8",
        **plan.provider_environment,
    }


async def _until_all_registered(stage: Stage) -> None:
    async with asyncio.timeout(_START_SECONDS):
        for worker in stage.workers:
            while await worker_of(stage.pool, worker.pid) is None:
                worker.check()
                await asyncio.sleep(_POLL_SECONDS)
