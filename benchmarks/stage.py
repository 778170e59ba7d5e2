"""Servers, provider and workers for one measurement, started fresh in a temporary directory."""

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit
from uuid import uuid4

from child import Child, child

from headrace_producer import Headrace, JobRequest
from headrace_shared.embedded import embedded_servers
from headrace_shared.store import migrate
from headrace_shared.store.pool import Connection, connect

_POLL_SECONDS = 0.05
_PATIENCE_SECONDS = 100
_SPAN = """SELECT count(*) FILTER (WHERE state = 'succeeded') AS succeeded,
       count(*) FILTER (WHERE ended_at IS NOT NULL) AS ended,
       extract(epoch FROM max(ended_at) - min(started_at))::float8 AS seconds
FROM headrace.jobs WHERE tenant = $1"""
_COMMITS = "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()"


def requests(count: int, tenant: str | None = None) -> list[JobRequest]:
    return [JobRequest("/v1/chat/completions", body(number), tenant=tenant) for number in range(count)]


def body(number: int) -> dict[str, object]:
    return {
        "model": "gpt-4o-mini",
        "messages": [{"role": "user", "content": f"Say hello to number {number}."}],
    }


@dataclass(frozen=True, slots=True)
class Stage:
    postgres_url: str
    redis_url: str
    provider_url: str
    provider: Child
    headrace: Headrace
    connection: Connection
    directory: Path
    """Where the embedded servers live."""
    lease_seconds: float | None = None

    def environment(self, *, slots: int = 1, provider_url: str | None = None) -> dict[str, str]:
        """Return what a child process is told; nothing of Headrace's own environment reaches it."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")}
        return {
            **inherited,
            "DATABASE_URL": self.postgres_url,
            "HEADRACE_POSTGRES_URL": self.postgres_url,
            "HEADRACE_REDIS_URL": self.redis_url,
            "HEADRACE_CONCURRENCY": str(slots),
            **({"HEADRACE_LEASE_SECONDS": str(self.lease_seconds)} if self.lease_seconds else {}),
            "OPENAI_API_KEY": "sk-simulated",
            "OPENAI_BASE_URL": provider_url or self.provider_url,
        }

    @asynccontextmanager
    async def workers(
        self, count: int, *, slots: int, provider_url: str | None = None
    ) -> AsyncGenerator[list[Child]]:
        """Run some workers of `slots` jobs each."""
        environment = self.environment(slots=slots, provider_url=provider_url)
        async with AsyncExitStack() as stack:
            started = [
                await stack.enter_async_context(child("worker_process.py", environment=environment))
                for _ in range(count)
            ]
            await asyncio.gather(*(worker.hear() for worker in started))
            yield started

    async def run_jobs(self, count: int) -> float:
        """Enqueue jobs; return the seconds from the first claim to the last end."""
        tenant = uuid4().hex
        await self.headrace.enqueue_many(requests(count, tenant))
        succeeded, seconds = await self._until_ended(tenant, count)
        if succeeded < count:
            raise RuntimeError(f"{count - succeeded} of {count} jobs failed")
        return seconds

    async def _until_ended(self, tenant: str, count: int) -> tuple[int, float]:
        # One transaction, so that watching does not count as statements of the jobs.
        async with asyncio.timeout(_PATIENCE_SECONDS), self.connection.transaction():
            while True:
                row = await self.connection.fetchrow(_SPAN, tenant)
                if row is not None and row["ended"] == count:
                    return row["succeeded"], row["seconds"]
                await asyncio.sleep(_POLL_SECONDS)

    async def statements(self) -> int:
        """Return the transactions that Postgres has committed; sessions count when they have ended."""
        return int(await self.connection.fetchval(_COMMITS))

    async def redis_commands(self) -> tuple[int, int]:
        """Return the scripts that Redis has run, and all its commands, those inside scripts included."""
        reader, writer = await asyncio.open_unix_connection(urlsplit(self.redis_url).path)
        writer.write(b"INFO commandstats\r\n")
        text = await reader.readexactly(int((await reader.readline())[1:]))
        writer.close()
        calls: dict[str, int] = {}
        for line in text.decode().splitlines():
            if line.startswith("cmdstat_"):
                name, _, statistics = line.removeprefix("cmdstat_").partition(":calls=")
                calls[name] = int(statistics.split(",", 1)[0])
        return calls.get("evalsha", 0) + calls.get("eval", 0), sum(calls.values())


@asynccontextmanager
async def open_stage(*, latency: float = 0, lease_seconds: float | None = None) -> AsyncGenerator[Stage]:
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(TemporaryDirectory(prefix="headrace-bench-"))
        servers = await stack.enter_async_context(embedded_servers(Path(directory), durable=True))
        connection = await connect(servers.postgres_url)
        stack.push_async_callback(connection.close)
        await migrate.migrate(connection)
        provider = await stack.enter_async_context(
            child("provider_process.py", latency, environment=dict(os.environ))
        )
        provider_url = str((await provider.hear())["url"])
        headrace = await stack.enter_async_context(Headrace(servers.postgres_url, servers.redis_url))
        yield Stage(
            servers.postgres_url,
            servers.redis_url,
            provider_url,
            provider,
            headrace,
            connection,
            Path(directory),
            lease_seconds,
        )
