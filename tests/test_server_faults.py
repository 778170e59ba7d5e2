"""The levers on real servers: what is there afterwards, and what is not."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path
from typing import cast

import asyncpg
import pytest
import pytest_asyncio

from headrace_shared.dispatch.connection import Redis
from headrace_shared.embedded import embedded_servers
from headrace_shared.errors import DispatchUnavailable, EmbeddedServerFailed, StoreUnavailable
from headrace_shared.store.pool import Connection, connect
from headrace_shared.testing import server_faults
from headrace_shared.testing.clock import script
from headrace_shared.testing.server_faults import OwnServers

SET = script("return redis.call('SET', KEYS[1], ARGV[1])")
GET = script("return redis.call('GET', KEYS[1])")


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="headrace-tests-") as name:
        yield Path(name)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def own(directory: Path) -> AsyncIterator[OwnServers]:
    async with embedded_servers(directory):
        yield OwnServers.of(directory)


@pytest.fixture
async def valkey(own: OwnServers) -> AsyncIterator[Redis]:
    redis = Redis(own.valkey.url)
    await server_faults.flush_redis(own.valkey.url)
    yield redis
    await redis.close()


@pytest.fixture
async def session(own: OwnServers) -> AsyncIterator[Connection]:
    connection = await connect(own.postgres.url)
    await connection.execute("DROP TABLE IF EXISTS kept; CREATE TABLE kept (value int)")
    yield connection
    connection.terminate()


async def values(own: OwnServers) -> list[int]:
    connection = await connect(own.postgres.url)
    rows = await connection.fetch("SELECT value FROM kept ORDER BY value")
    await connection.close()
    return [row["value"] for row in rows]


async def put(redis: Redis, value: str) -> None:
    """Write, and wait until it is on the disk: a write may linger for two seconds while another is synced."""
    await redis.evaluate(SET, ["kept"], [value])
    await redis.administer("WAITAOF", 1, 0, 10_000)


async def got(redis: Redis) -> object:
    return await redis.evaluate(GET, ["kept"])


async def test_what_was_committed_outlives_a_crash_of_postgres(own: OwnServers, session: Connection) -> None:
    await session.execute("INSERT INTO kept VALUES (1)")
    open_transaction = session.transaction()
    await open_transaction.start()
    await session.execute("INSERT INTO kept VALUES (2)")
    await server_faults.restart_postgres(own, pause=timedelta(milliseconds=1))
    assert await values(own) == [1]
    with pytest.raises((OSError, asyncpg.PostgresError, asyncpg.InterfaceError)):
        await session.execute("SELECT 1")


async def test_postgres_is_away_until_it_is_started_again(own: OwnServers) -> None:
    async with server_faults.postgres_down(own):
        with pytest.raises(StoreUnavailable):
            await connect(own.postgres.url)
    connection = await connect(own.postgres.url)
    await connection.close()


async def test_a_crash_of_postgres_is_a_crash(own: OwnServers) -> None:
    own.postgres.process.log.write_bytes(b"")
    await server_faults.restart_postgres(own)
    assert "was not properly shut down" in own.postgres.process.log.read_text()
    async with server_faults.postgres_down(own, "fast"):
        own.postgres.process.log.write_bytes(b"")
    assert "was not properly shut down" not in own.postgres.process.log.read_text()


async def test_a_frozen_postgres_answers_nobody_and_goes_on_where_it_was(
    own: OwnServers, session: Connection
) -> None:
    other = await connect(own.postgres.url)
    async with server_faults.frozen_postgres(own):
        async with asyncio.timeout(30):
            while {state(pid) for pid in processes_of(own)} != {"T"}:  # noqa: ASYNC110  the kernel rings no bell
                await asyncio.sleep(0)
        pending = asyncio.ensure_future(session.execute("INSERT INTO kept VALUES (3)"))
        await asyncio.wait([pending], timeout=0)
        assert not pending.done()
    await pending
    assert await other.fetchval("SELECT value FROM kept") == 3
    await other.close()
    assert await values(own) == [3]


def processes_of(own: OwnServers) -> set[int]:
    """The postmaster and its children, by the kernel's word."""
    postmaster = int((own.postgres.process.home / "postmaster.pid").read_text().split()[0])
    children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split()
    return {postmaster, *map(int, children)}


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


async def test_terminating_backends_ends_the_others_of_this_database_only(
    own: OwnServers, session: Connection
) -> None:
    await session.execute("DROP DATABASE IF EXISTS elsewhere")
    await session.execute("CREATE DATABASE elsewhere")
    elsewhere = await connect(own.postgres.url.replace("/postgres?", "/elsewhere?"))
    ended = asyncio.Event()
    session.add_termination_listener(lambda _: ended.set())
    assert await server_faults.terminate_backends(own.postgres.url) == 1
    await ended.wait()
    assert await elsewhere.fetchval("SELECT 1") == 1
    await elsewhere.close()


async def test_a_killed_valkey_comes_back_with_its_data(own: OwnServers, valkey: Redis) -> None:
    await put(valkey, "1")
    before = valkey.run_id
    async with server_faults.valkey_down(own):
        another = Redis(own.valkey.url)
        with pytest.raises(DispatchUnavailable):
            await got(another)
        await another.close()
    assert await got(valkey) == b"1"
    assert valkey.run_id != before


async def test_a_killed_valkey_comes_back_without_its_data(own: OwnServers, valkey: Redis) -> None:
    await put(valkey, "1")
    await server_faults.restart_valkey(own, "lost", pause=timedelta(milliseconds=1))
    assert await got(valkey) is None


async def test_a_killed_valkey_comes_back_with_older_data(
    own: OwnServers, valkey: Redis, directory: Path
) -> None:
    await put(valkey, "old")
    snapshot = await server_faults.take_snapshot(own, directory / "snapshot")
    await put(valkey, "new")
    assert await got(valkey) == b"new"
    await server_faults.restart_valkey(own, snapshot)
    assert await got(valkey) == b"old"
    await put(valkey, "newer")
    await server_faults.restart_valkey(own)
    assert await got(valkey) == b"newer"
    await server_faults.restart_valkey(own, snapshot)
    assert await got(valkey) == b"old"


async def test_a_flushed_redis_is_empty_and_the_same_server(own: OwnServers, valkey: Redis) -> None:
    await put(valkey, "1")
    before = valkey.run_id
    await server_faults.flush_redis(own.valkey.url)
    assert await got(valkey) is None
    assert valkey.run_id == before


async def test_a_paused_redis_lets_writes_wait(own: OwnServers, valkey: Redis) -> None:
    await valkey.check()
    await server_faults.pause_redis(own.valkey.url, timedelta(hours=1), "writes")
    pending = asyncio.ensure_future(valkey.administer("SET", "kept", "2"))
    try:
        while b" flags=b" not in cast("bytes", await valkey.administer("CLIENT", "LIST")):
            assert not pending.done()
    finally:
        await valkey.administer("CLIENT", "UNPAUSE")
    await pending
    assert await got(valkey) == b"2"


async def test_a_redis_without_memory_refuses_writes_and_keeps_what_it_has(
    own: OwnServers, valkey: Redis
) -> None:
    await put(valkey, "1")
    before = await valkey.administer("CONFIG", "GET", "maxmemory*")
    async with server_faults.out_of_memory(own.valkey.url):
        with pytest.raises(DispatchUnavailable, match=r"OOM|maxmemory"):
            await put(valkey, "2")
        assert await got(valkey) == b"1"
    await put(valkey, "3")
    assert await valkey.administer("CONFIG", "GET", "maxmemory*") == before


def test_a_folder_without_servers_has_none_to_harm(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedServerFailed, match="never started"):
        OwnServers.of(tmp_path)
