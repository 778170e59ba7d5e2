"""PostgreSQL, the record: what durability, time and room rely on, directly or through a pooler."""

from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from headrace_shared.doctor.findings import Finding, ok, problem, warning
from headrace_shared.errors import (
    HeadraceError,
    InvalidConfiguration,
    StoreNotMigrated,
    StoreTooOld,
    StoreUnavailable,
)
from headrace_shared.settings import Settings
from headrace_shared.store import configurations, migrate
from headrace_shared.store.pool import UNREACHABLE, WORKER_POOL_SIZE, address, connect, open_pool
from headrace_shared.store.sql import Statements

if TYPE_CHECKING:
    from headrace_shared.store.pool import Connection

_SQL = Statements("doctor.sql")
_WEEKS_WANTED = 3
_CONNECTIONS_OF_A_WORKER = WORKER_POOL_SIZE + 1
"""Its pool, and the one that listens."""
_USE_POOLER = (
    "The URL leads through PgBouncer: set HEADRACE_POOLER=true (and HEADRACE_LISTEN_URL to a direct one)."
)


async def examine_postgres(url: str, settings: Settings) -> tuple[list[Finding], bool]:
    """Look at the server and the schema; say as well whether its clock can be read."""
    try:
        connection = await connect(url)
    except StoreTooOld as error:
        return [problem("postgres version", error.message)], False
    except StoreUnavailable as error:
        return [problem("postgres reachable", error.message)], False
    try:
        found = await _server(connection, url)
        migrated = await _schema(connection)
        found.append(migrated)
        is_current = migrated.level == "ok"
        if is_current:
            found += [*await _inside(connection, settings), await _configuration(connection)]
    finally:
        await connection.close(timeout=5)
    return [*found, *await _ways(url, settings, migrated=is_current)], is_current


async def _server(connection: "Connection", url: str) -> list[Finding]:
    facts = await connection.fetchrow(_SQL["server_facts"])
    if facts is None:
        raise LookupError
    version = facts["version"] // 10000
    found = [ok("postgres reachable", f"PostgreSQL {version} answers at {address(url)}.")]
    if facts["standby"]:
        found.append(
            problem("postgres role", "It is a standby: HEADRACE_POSTGRES_URL must name the primary.")
        )
    found.append(_setting("synchronous_commit", facts["synchronous_commit"], "a crash of the server"))
    found.append(_setting("fsync", facts["fsync"], "a power cut"))
    if facts["autovacuum"] == "on":
        found.append(ok("postgres autovacuum", "autovacuum is on."))
    else:
        says = "autovacuum is off: every statement becomes slower as tables grow; set autovacuum = on."
        found.append(problem("postgres autovacuum", says))
    return found


def _setting(name: str, value: str, loss: str) -> Finding:
    if value != "off":
        return ok(f"postgres {name}", f"{name} is {value}.")
    says = f"{name} is off: {loss} loses jobs that were accepted; set {name} = on for this role and database."
    return problem(f"postgres {name}", says)


async def _schema(connection: "Connection") -> Finding:
    try:
        await migrate.check(connection)
    except StoreNotMigrated as error:
        return problem("postgres schema", error.message)
    except asyncpg.InsufficientPrivilegeError:
        return problem("postgres schema", "This user may not read the schema headrace: grant it.")
    return ok("postgres schema", f"The schema has version {await migrate.schema_version(connection)}.")


async def _inside(connection: "Connection", settings: Settings) -> list[Finding]:
    facts = await connection.fetchrow(_SQL["schema_facts"])
    server = await connection.fetchrow(_SQL["server_facts"])
    if facts is None or server is None:
        raise LookupError
    return [_partitions(facts["weeks"]), _connections(server["connections"], facts["workers"], settings)]


def _partitions(weeks: int) -> Finding:
    check, ahead = "postgres partitions", max(weeks - 1, 0)
    if weeks <= 1:
        says = f"There are partitions for {ahead} weeks ahead, and soon no job is taken: a worker makes four."
        return problem(check, says)
    if weeks < _WEEKS_WANTED:
        return warning(
            check, f"There are partitions for {ahead} weeks ahead: a worker makes four, start one."
        )
    return ok(check, f"There are partitions for {ahead} weeks ahead.")


def _connections(room: int, workers: int, settings: Settings) -> Finding:
    check = "postgres connections"
    if settings.pooler:
        return ok(check, f"A pooler shares out the {room} connections that the server allows.")
    needed = workers * _CONNECTIONS_OF_A_WORKER
    says = f"{workers} live workers take up to {needed} of the {room} connections that the server allows"
    if needed > room:
        return problem(check, f"{says}: raise max_connections, or put PgBouncer in between.")
    if needed > room * 0.8:
        return warning(check, f"{says}, which leaves few for clients: raise max_connections.")
    return ok(check, f"{says}.")


async def _configuration(connection: "Connection") -> Finding:
    try:
        present = await configurations.current(connection)
    except InvalidConfiguration as error:
        says = f"The one in force cannot be read ({error.message}): apply one with 'headrace config apply'."
        return problem("configuration", says)
    known = f"version {present.version}" if present.version else "the built-in one"
    return ok("configuration", f"The configuration in force is {known}.")


async def _ways(url: str, settings: Settings, *, migrated: bool) -> list[Finding]:
    """Whether statements and notifications pass, as clients and workers send them."""
    if not settings.pooler:
        return [await _direct(url, migrated=migrated)]
    found = [await _pooled(url)] if migrated else []
    if settings.listen_url is None:
        says = "HEADRACE_LISTEN_URL is not set: the feeder asks once a second instead of listening."
        return [*found, ok("postgres notifications", says)]
    return [*found, await _listening(settings.listen_url)]


async def _direct(url: str, *, migrated: bool) -> Finding:
    check = "postgres pooler"
    if await _is_pgbouncer(url):
        return problem(check, _USE_POOLER)
    if migrated:
        try:
            pool = await open_pool(url, size=1)
            await pool.close()
        except HeadraceError as error:
            if "startup parameter" in error.message:
                return problem(check, _USE_POOLER)
            return problem(check, error.message)
    return ok(check, "The URL leads to the server itself.")


async def _is_pgbouncer(url: str) -> bool:
    """Ask for PgBouncer's own console, which a server has no database for."""
    console = urlunsplit(urlsplit(url)._replace(path="/pgbouncer"))
    try:
        connection = await asyncpg.connect(console, timeout=10, statement_cache_size=0)
    except asyncpg.InvalidCatalogNameError:
        return False
    except (*UNREACHABLE, asyncpg.PostgresError, ValueError) as error:
        return "not allowed" in str(error) or "startup parameter" in str(error)
    await connection.close(timeout=5)
    return False


async def _pooled(url: str) -> Finding:
    """Two transactions with parameters, as they go through a pooler: nothing stays prepared."""
    check = "postgres pooler"
    try:
        pool = await open_pool(url, size=2, pooler=True)
        try:
            for _ in range(2):
                async with pool.acquire() as connection, connection.transaction():
                    await connection.fetchrow("SELECT $1::int", 1)
        finally:
            await pool.close()
    except (HeadraceError, asyncpg.PostgresError, *UNREACHABLE) as error:
        return problem(check, f"Statements do not pass the pooler ({error}): it must pool by transaction.")
    return ok(check, "Statements pass the pooler.")


async def _listening(url: str) -> Finding:
    check = "postgres notifications"
    try:
        connection = await connect(url)
        try:
            await connection.execute("LISTEN headrace")
        finally:
            await connection.close(timeout=5)
    except (HeadraceError, asyncpg.PostgresError, *UNREACHABLE) as error:
        return problem(check, f"HEADRACE_LISTEN_URL does not work ({error}): name the server itself there.")
    if await _is_pgbouncer(url):
        return problem(check, "HEADRACE_LISTEN_URL leads through PgBouncer, which loses notifications.")
    return ok(check, "The feeder listens at HEADRACE_LISTEN_URL.")
