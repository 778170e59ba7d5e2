"""The way to PostgreSQL: one pool per process, checked when it is opened."""

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol
from urllib.parse import parse_qs, urlsplit

import asyncpg

from headrace_shared.errors import InvalidConfiguration, StoreTooOld, StoreUnavailable
from headrace_shared.store import migrate

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

    Connection = asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]
    Pool = asyncpg.Pool[asyncpg.Record]
else:
    Connection = asyncpg.Connection
    Pool = asyncpg.Pool

OLDEST_SUPPORTED = 150000
# Statements are planned once a connection, perhaps while a week's partition is still empty: what
# would be read as a whole then must be found by an index when it has grown.
_PLANNING = {"plan_cache_mode": "force_generic_plan", "enable_seqscan": "off", "jit": "off"}
WORKER_POOL_SIZE = 6
"""Connections that a worker has at most, beside the one that listens."""
UNREACHABLE = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.exceptions.InsufficientResourcesError,
    asyncpg.exceptions.OperatorInterventionError,
    asyncpg.exceptions.ReadOnlySQLTransactionError,
    asyncpg.exceptions.TransactionRollbackError,
)
"""What asyncpg raises when the server is away, coming back, full, or gave way in a deadlock:
the same statement can succeed later, and nothing is wrong with what it says."""


class Database(Protocol):
    """What a query needs: a pool, or one connection inside a transaction."""

    async def fetch(self, query: str, *args: object) -> Sequence[asyncpg.Record]: ...
    async def fetchrow(self, query: str, *args: object) -> asyncpg.Record | None: ...
    async def execute(self, query: str, *args: object) -> str: ...


@asynccontextmanager
async def in_transaction(database: Pool | Connection) -> AsyncGenerator[Database]:
    """Enter a transaction on a connection of a pool; a connection that is given is in one already."""
    if not isinstance(database, asyncpg.Pool):
        yield database
        return
    async with database.acquire() as connection, connection.transaction():
        yield connection


def address(url: str) -> str:
    """Return host and database of a URL, without its user and password."""
    parts = urlsplit(url)
    host = parse_qs(parts.query).get("host", [parts.hostname or "localhost"])[0]
    return f"{host}:{parts.port}{parts.path}" if parts.port else f"{host}{parts.path}"


async def connect(url: str, *, timeout: float = 10) -> Connection:
    """Open one connection, for migrations and for listening.

    Raises:
        InvalidConfiguration: the URL is not one of PostgreSQL.
        StoreUnavailable: nothing answers there, or it refuses.
        StoreTooOld: the server is older than PostgreSQL 15.

    """
    _check_url(url)
    connection: asyncpg.Connection[asyncpg.Record] | None = None
    try:
        connection = await asyncpg.connect(url, timeout=timeout, statement_cache_size=0)
        await _check_version(connection, url)
    except (*UNREACHABLE, asyncpg.PostgresError, ValueError) as error:
        if connection is not None:
            connection.terminate()
        raise StoreUnavailable(address=address(url), reason=_reason(error)) from error
    return connection


async def open_pool(url: str, *, size: int = 10, pooler: bool = False) -> Pool:
    """Open the pool of a process and check the server and its schema.

    Args:
        url: where PostgreSQL is.
        size: connections at most.
        pooler: true behind PgBouncer in transaction mode: no statement is kept prepared.

    Raises:
        StoreUnavailable: nothing answers there, or it refuses.
        StoreTooOld: the server is older than PostgreSQL 15.
        StoreNotMigrated: the schema is older than this code.

    """
    _check_url(url)
    try:
        pool = await asyncpg.create_pool(
            url,
            # One that keeps connections open by itself logs each failure to do so, with its traceback.
            min_size=0,
            max_size=size,
            timeout=10,
            command_timeout=60,
            statement_cache_size=0 if pooler else 200,
            max_cached_statement_lifetime=0,
            reset=_keep,
            server_settings={} if pooler else _PLANNING,
        )
        try:
            async with pool.acquire() as connection:
                await _check_version(connection, url)
                await migrate.check(connection)
        except BaseException:
            await pool.close()
            raise
    except (*UNREACHABLE, asyncpg.PostgresError, ValueError) as error:
        raise StoreUnavailable(address=address(url), reason=_reason(error)) from error
    return pool


async def _keep(_connection: Connection) -> None:
    """A connection goes back as it is: no query leaves anything in its session to clean up."""


async def _check_version(connection: Connection, url: str) -> None:
    number = int(await connection.fetchval("SHOW server_version_num"))
    if number < OLDEST_SUPPORTED:
        await connection.close()
        raise StoreTooOld(address=address(url), version=f"{number // 10000}.{number % 10000}")


def _check_url(url: str) -> None:
    if urlsplit(url).scheme not in ("postgres", "postgresql"):
        raise InvalidConfiguration(
            where="HEADRACE_POSTGRES_URL",
            reason="must begin with postgresql://, as postgresql://host/database",
        )


def _reason(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


def json_object(text: str | None) -> Mapping[str, str]:
    """Read a jsonb column of strings; asyncpg hands it over as text."""
    value: dict[str, str] = json.loads(text) if text else {}
    return value
