"""The servers of a run: its own in a directory, or given ones that nobody else uses Headrace on."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from headrace_producer.chaos import records, redis_keys
from headrace_shared.dispatch.connection import Redis
from headrace_shared.errors import InvalidConfiguration
from headrace_shared.servers import own_servers
from headrace_shared.settings import Settings
from headrace_shared.store import migrate
from headrace_shared.store.pool import Connection, connect
from headrace_shared.testing.server_faults import OwnServers

SOURCE = "headrace chaos"
"""Who applied the configuration of a run."""


@dataclass(frozen=True, slots=True)
class Servers:
    """Where they are, and the processes when they are chaos' own."""

    postgres_url: str
    redis_url: str
    own: OwnServers | None


def are_given(settings: Settings) -> bool:
    """Say whether the environment names servers; raise MissingSetting when it names only one."""
    if not settings.postgres_url and not settings.redis_url:
        return False
    settings.require_postgres()
    settings.require_redis()
    return True


@asynccontextmanager
async def open_servers(settings: Settings, directory: Path) -> AsyncGenerator[Servers]:
    """Start servers, or check and prepare the given ones.

    Raises:
        InvalidConfiguration: somebody else has jobs, workers or a configuration on the given ones.

    """
    if not are_given(settings):
        async with own_servers(directory) as started:
            yield Servers(started.postgres_url, started.redis_url, OwnServers.of(directory))
        return
    given = Servers(settings.require_postgres(), settings.require_redis(), None)
    redis = Redis(given.redis_url)
    try:
        await _check_redis(redis)
        await _check_postgres(given.postgres_url)
        try:
            yield given
        finally:
            await redis_keys.forget(redis)
    finally:
        await redis.close()


async def _check_redis(redis: Redis) -> None:
    if await redis_keys.count(redis) != 0:
        raise InvalidConfiguration(
            where="HEADRACE_REDIS_URL",
            reason="somebody uses Headrace there: give chaos an empty database, as redis://host/15",
        )


async def _check_postgres(url: str) -> None:
    connection = await connect(url)
    try:
        found = await _somebodys(connection)
        if found:
            raise InvalidConfiguration(
                where="HEADRACE_POSTGRES_URL",
                reason=f"somebody uses Headrace there ({found}): give chaos an empty database",
            )
        await migrate.migrate(connection)
    finally:
        await connection.close()


async def _somebodys(connection: Connection) -> str | None:
    """Say what is there that is not chaos' own; None for a database that it may use."""
    found = await records.somebodys(connection, SOURCE)
    words = {"workers": "live workers", "jobs": "unfinished jobs", "configurations": "a configuration"}
    return next((text for name, text in words.items() if found.get(name)), None)
