"""Real servers for every test: one pair per test process, and a database of its own per test.

`HEADRACE_TEST_POSTGRES_URL` and `HEADRACE_TEST_REDIS_URL` name servers to use instead of
embedded ones. The Postgres user must be one that may create databases; in Redis, a test
process empties the database of its own number (`gw3`: 3). `HEADRACE_TEST_POOLER_URL` names a
PgBouncer in transaction mode before that Postgres, with an entry for any database (`* = host=...`):
databases are made directly, and everything else goes through it.
"""

import logging
import os
import re
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from shutil import disk_usage
from typing import TypeAlias
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import pytest
import pytest_asyncio
from command_line import Command, write_requests
from hypothesis import HealthCheck, settings

from headrace_producer import Headrace
from headrace_shared import ids
from headrace_shared.budgets import Budgets
from headrace_shared.dispatch.connection import Redis
from headrace_shared.dispatch.dispatch import Dispatch
from headrace_shared.embedded import embedded_servers
from headrace_shared.networks import parse_address
from headrace_shared.store import migrate
from headrace_shared.store.pool import Pool, connect, open_pool
from headrace_shared.testing.clock import Clock, script
from headrace_shared.testing.scripted_provider import ScriptedProvider, completion
from headrace_shared.testing.simulated_provider import SimulatedProvider
from headrace_workers.breaker import Breakers
from headrace_workers.configured import Configured
from headrace_workers.reaper import Reaper

_MEMORY = Path("/dev/shm")  # noqa: S108 - a file system, and no name of a file
_ENOUGH = 6 * 2**30


# How long an example takes says more about the machine than about the code.
settings.register_profile(
    "headrace",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("headrace")


def pytest_configure() -> None:
    """Let the servers' files be in memory where there is plenty: each database is a thousand files."""
    if "TMPDIR" not in os.environ and os.access(_MEMORY, os.W_OK) and disk_usage(_MEMORY).free > _ENOUGH:
        os.environ["TMPDIR"] = tempfile.tempdir = str(_MEMORY)


Address: TypeAlias = tuple[str, int] | tuple[str, int, int, int] | str | bytes


@dataclass(frozen=True, slots=True)
class Servers:
    postgres_url: str
    """Of a database to create others from; no test uses it."""
    redis_url: str
    pooler_url: str | None
    """Of a pooler before this Postgres, whatever database it names."""
    copying: str = "WAL_LOG"
    """The strategy of a database's copy. To copy files takes a checkpoint, and a fifth of the time where
    a checkpoint costs nothing: where nothing is flushed to a disk."""

    async def administer(self, sql: str) -> None:
        connection = await connect(self.postgres_url)
        try:
            await connection.execute(sql)
        finally:
            await connection.close()

    def database_url(self, database: str) -> str:
        return _with_database(self.postgres_url, database)

    def pooled_url(self, database: str) -> str:
        """The way that clients and workers take: through the pooler, where there is one."""
        return _with_database(self.pooler_url or self.postgres_url, database)


def _with_database(url: str, database: str) -> str:
    return urlunsplit(urlsplit(url)._replace(path=f"/{database}"))


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def servers() -> AsyncIterator[Servers]:
    postgres_url = os.environ.get("HEADRACE_TEST_POSTGRES_URL")
    redis_url = os.environ.get("HEADRACE_TEST_REDIS_URL")
    pooler_url = os.environ.get("HEADRACE_TEST_POOLER_URL")
    if pooler_url and not postgres_url:
        pytest.fail("HEADRACE_TEST_POOLER_URL is set: name its Postgres in HEADRACE_TEST_POSTGRES_URL")
    if postgres_url and redis_url:
        number = re.sub(r"\D", "", os.environ.get("PYTEST_XDIST_WORKER", "")) or "0"
        yield Servers(
            postgres_url, urlunsplit(urlsplit(redis_url)._replace(query=f"db={number}")), pooler_url
        )
        return
    # Not below pytest's own directory, which a second run of the same user closes to the servers' user.
    with tempfile.TemporaryDirectory(prefix="headrace-tests-") as directory:
        async with embedded_servers(Path(directory), durable=False) as started:
            copying = "WAL_LOG" if postgres_url else "FILE_COPY"
            yield Servers(
                postgres_url or started.postgres_url, redis_url or started.redis_url, pooler_url, copying
            )


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def template(servers: Servers) -> AsyncIterator[str]:
    """The name of a migrated database that the tests' own are copies of."""
    name = f"headrace_template_{uuid4().hex}"
    await servers.administer(f"CREATE DATABASE {name}")
    connection = await connect(servers.database_url(name))
    await migrate.migrate(connection)
    await connection.close()
    yield name
    await servers.administer(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
async def empty_postgres_url(servers: Servers) -> AsyncIterator[str]:
    """The URL of a database without a schema."""
    name = f"headrace_test_{uuid4().hex}"
    await servers.administer(f"CREATE DATABASE {name} STRATEGY {servers.copying}")
    yield servers.database_url(name)
    await servers.administer(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
async def database_name(servers: Servers, template: str) -> AsyncIterator[str]:
    """The name of a migrated database that nobody else uses."""
    name = f"headrace_test_{uuid4().hex}"
    await servers.administer(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY {servers.copying}")
    yield name
    await servers.administer(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def postgres_url(servers: Servers, database_name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of the test's database, as clients and workers have it."""
    if servers.pooler_url is not None:
        monkeypatch.setenv("HEADRACE_POOLER", "true")
    return servers.pooled_url(database_name)


@pytest.fixture
def direct_url(servers: Servers, database_name: str) -> str:
    """The URL of the same database past any pooler: to listen, which needs a session."""
    return servers.database_url(database_name)


@pytest.fixture
async def redis_url(servers: Servers) -> str:
    """The URL of an empty Redis database."""
    redis = Redis(servers.redis_url)
    await redis.evaluate(script("return redis.call('FLUSHDB')"))
    await redis.close()
    return servers.redis_url


@pytest.fixture
async def pool(servers: Servers, postgres_url: str) -> AsyncIterator[Pool]:
    pool = await open_pool(postgres_url, pooler=servers.pooler_url is not None)
    yield pool
    await pool.close()


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    redis = Redis(redis_url)
    await redis.check()
    yield redis
    await redis.close()


@pytest.fixture
def dispatch(redis: Redis) -> Dispatch:
    return Dispatch(redis)


@pytest.fixture
def budgets(pool: Pool, redis: Redis) -> Budgets:
    return Budgets(pool, redis)


@pytest.fixture
def clock(pool: Pool, redis: Redis, monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(pool, redis)
    monkeypatch.setattr(ids, "time", clock)
    return clock


@pytest.fixture
async def provider(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SimulatedProvider]:
    """A simulated provider that the default one stands for."""
    async with SimulatedProvider() as provider:
        monkeypatch.setenv("OPENAI_API_KEY", "sk-simulated")
        monkeypatch.setenv("OPENAI_BASE_URL", provider.url)
        yield provider


@pytest.fixture
async def scripted(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ScriptedProvider]:
    """A provider of scripted answers that the default one stands for; without a script it says Hello."""
    async with ScriptedProvider([completion()]) as scripted:
        monkeypatch.setenv("OPENAI_API_KEY", "sk-scripted")
        monkeypatch.setenv("OPENAI_BASE_URL", scripted.url)
        yield scripted


@pytest.fixture
def silent(scripted: ScriptedProvider) -> ScriptedProvider:
    """The same, but it does not answer before it is told."""
    scripted.open.clear()
    return scripted


@pytest.fixture
async def reaper(pool: Pool, dispatch: Dispatch, budgets: Budgets) -> Reaper:
    """One under the configuration of the beginning, for leases of half a minute."""
    configured = await Configured.load(pool)
    return Reaper(
        pool, dispatch, budgets, Breakers(dispatch, configured), configured, lease=timedelta(seconds=30)
    )


@pytest.fixture
def environment(postgres_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The servers, as a process finds them."""
    monkeypatch.setenv("HEADRACE_POSTGRES_URL", postgres_url)
    monkeypatch.setenv("HEADRACE_REDIS_URL", redis_url)


@pytest.fixture
async def headrace(environment: None) -> AsyncIterator[Headrace]:
    """An open client of these servers, whose tenant is `default`."""
    async with Headrace() as headrace:
        yield headrace


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """`headrace`, in a folder of the test's own; it finds servers only with `environment`."""
    monkeypatch.chdir(tmp_path)
    return Command(capsys, tmp_path)


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    """A file of four requests."""
    return write_requests(tmp_path / "requests.jsonl", 4)


@pytest.fixture(autouse=True)
def no_outer_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the developer's: neither settings nor a key that would be spent."""
    for name in os.environ:
        if name.startswith(("HEADRACE_", "OPENAI_")) and not name.startswith("HEADRACE_TEST_"):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    """Put the root logger back: a command sends all logs to the standard error of its test alone."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


@pytest.fixture(scope="session", autouse=True)
def no_calls_to_the_outside() -> Iterator[None]:
    """A connection that would leave this machine is an error, except to the servers that were named."""
    named = {
        str(found[4][0])
        for variable in (f"HEADRACE_TEST_{server}_URL" for server in ("POSTGRES", "REDIS", "POOLER"))
        if (host := urlsplit(os.environ.get(variable, "")).hostname)
        for found in socket.getaddrinfo(host, None)
    }
    original = socket.socket.connect

    def connect_inside(self: socket.socket, address: Address, /) -> None:
        host = str(address[0]) if isinstance(address, tuple) else "localhost"
        if host not in named and not _is_this_machine(host):
            pytest.fail(f"a test called {host}: tests call nobody outside of this machine")
        original(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_inside)
        yield


def _is_this_machine(host: str) -> bool:
    address = parse_address(host)
    return host == "localhost" if address is None else address.is_loopback
