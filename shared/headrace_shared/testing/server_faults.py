"""What can be done to real servers: to any by URL, and to embedded ones as processes, too.

A server that is started again is at its former address, so that its clients find it. Those who
take part in embedded servers must not enter or leave them while one is down or frozen.
"""

import asyncio
import os
import signal
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal, Self, TypeAlias, cast

from headrace_shared.dispatch.connection import Redis, milliseconds
from headrace_shared.embedded.membership import servers_in, to_the_end
from headrace_shared.embedded.postgres import Postgres
from headrace_shared.embedded.valkey import Valkey
from headrace_shared.store.pool import connect

_NO_PAUSE = timedelta(0)


@dataclass(frozen=True, slots=True)
class OwnServers:
    """The two servers of a folder that `embedded_servers` has started and this process takes part in."""

    postgres: Postgres
    valkey: Valkey
    durable: bool
    """As `embedded_servers` was told: a Valkey that is not durable has nothing left after its end."""

    @classmethod
    def of(cls, directory: Path, *, durable: bool = True) -> Self:
        """Those of `directory/.headrace`; raise EmbeddedServerFailed when none were started there."""
        postgres, valkey = servers_in(directory)
        return cls(postgres, valkey, durable)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A copy of what Valkey had on its disk at some time."""

    folder: Path


Data: TypeAlias = Literal["kept", "lost"] | Snapshot
"""What a Valkey finds on its disk when it starts again."""


@asynccontextmanager
async def postgres_down(
    own: OwnServers, mode: Literal["fast", "immediate"] = "immediate"
) -> AsyncGenerator[None]:
    """Stop PostgreSQL, by default as in a crash, and start it again at the end."""
    try:
        await to_the_end(lambda: own.postgres.stop(mode))
        yield
    finally:
        await to_the_end(lambda: own.postgres.ensure_running(durable=own.durable))


async def restart_postgres(own: OwnServers, *, pause: timedelta = _NO_PAUSE) -> None:
    """Stop PostgreSQL as in a crash (`-m immediate`) and start it again after a pause.

    What was committed is there afterwards; what was not is gone, and so are all sessions.
    """
    async with postgres_down(own):
        await asyncio.sleep(pause.total_seconds())


@asynccontextmanager
async def frozen_postgres(own: OwnServers) -> AsyncGenerator[None]:
    """Stop the clock of PostgreSQL and all its sessions (SIGSTOP), and let it go on at the end.

    Its socket still takes connections, which nobody answers; nothing that it was told is lost.
    """
    frozen: list[int] = []
    try:
        await _freeze(own.postgres, frozen)
        yield
    finally:
        for pid in frozen:
            _signal(pid, signal.SIGCONT)
        own.postgres.signal(signal.SIGCONT)


async def _freeze(postgres: Postgres, frozen: list[int]) -> None:
    connection = await connect(postgres.url)
    try:
        # The postmaster first: no session begins after they have been listed. This one's is the last.
        postgres.signal(signal.SIGSTOP)
        own: int = await connection.fetchval("SELECT pg_backend_pid()")
        rows = await connection.fetch("SELECT pid FROM pg_stat_activity WHERE pid <> $1", own)
        frozen.extend([*(row["pid"] for row in rows), own])
        for pid in frozen:
            _signal(pid, signal.SIGSTOP)
    finally:
        connection.terminate()


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


async def terminate_backends(postgres_url: str) -> int:
    """End all other sessions of the URL's database; return how many.

    Raises StoreUnavailable when the server is away.
    """
    connection = await connect(postgres_url)
    try:
        count: int = await connection.fetchval(_TERMINATE)
    finally:
        await connection.close()
    return count


_TERMINATE = """
SELECT count(*) FILTER (WHERE pg_terminate_backend(pid))
FROM pg_stat_activity
WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()
"""


@asynccontextmanager
async def valkey_down(own: OwnServers, data: Data = "kept") -> AsyncGenerator[None]:
    """Kill Valkey (SIGKILL), and start it again at the end, with these data on its disk.

    Of those that are kept, the writes of the last two seconds may be missing: they linger while others are
    synced to the disk.
    """
    try:
        await to_the_end(own.valkey.kill)
        yield
    finally:
        await to_the_end(lambda: _start_valkey(own, data))


async def restart_valkey(own: OwnServers, data: Data = "kept", *, pause: timedelta = _NO_PAUSE) -> None:
    """Kill Valkey (SIGKILL) and start it again after a pause: with its data, without, or with older ones."""
    async with valkey_down(own, data):
        await asyncio.sleep(pause.total_seconds())


async def take_snapshot(own: OwnServers, folder: Path) -> Snapshot:
    """Copy what Valkey has on its disk to a folder that does not exist yet."""
    await to_the_end(lambda: own.valkey.copy_data(folder))
    return Snapshot(folder)


def _start_valkey(own: OwnServers, data: Data) -> None:
    match data:
        case "kept":
            pass
        case "lost":
            own.valkey.replace_data(None)
        case Snapshot(folder):
            own.valkey.replace_data(folder)
    own.valkey.ensure_running(durable=own.durable)


async def flush_redis(redis_url: str) -> None:
    """Empty all databases of a server (FLUSHALL).

    Raises DispatchUnavailable when the server is away, or forbids it; so do the ones below.
    """
    async with _administered(redis_url) as redis:
        await redis.administer("FLUSHALL")


async def pause_redis(redis_url: str, duration: timedelta, what: Literal["all", "writes"] = "all") -> None:
    """Let the server answer no command, or none that writes, for some time (CLIENT PAUSE).

    A pause of everything cannot be ended early, as the server does not hear that either.
    """
    async with _administered(redis_url) as redis:
        mode = "ALL" if what == "all" else "WRITE"
        await redis.administer("CLIENT", "PAUSE", milliseconds(duration), mode)


@asynccontextmanager
async def out_of_memory(redis_url: str) -> AsyncGenerator[None]:
    """Let the server refuse writes for want of memory (OOM), and give it back its limits at the end."""
    async with _administered(redis_url) as redis:
        reply = await redis.administer("CONFIG", "GET", "maxmemory*")
        found = [word.decode() for word in cast("list[bytes]", reply)]
        limits = dict(zip(found[::2], found[1::2], strict=True))
        former = [word for name in ("maxmemory", "maxmemory-policy") for word in (name, limits[name])]
        try:
            await redis.administer("CONFIG", "SET", "maxmemory", 1, "maxmemory-policy", "noeviction")
            yield
        finally:
            await redis.administer("CONFIG", "SET", *former)


@asynccontextmanager
async def _administered(redis_url: str) -> AsyncGenerator[Redis]:
    redis = Redis(redis_url)
    try:
        yield redis
    finally:
        await redis.close()
