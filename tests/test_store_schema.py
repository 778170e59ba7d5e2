"""The schema: its statements, what it makes impossible, how it grows, and its weeks."""

import asyncio
import re
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from importlib.resources import files

import asyncpg
import pytest

from headrace_shared.embedded import binaries
from headrace_shared.errors import InvalidConfiguration, InvalidRequest, StoreNotMigrated
from headrace_shared.ids import JobId, Lane, RouteName, Tenant, new_job_id
from headrace_shared.job import NewJob
from headrace_shared.request import Endpoint
from headrace_shared.store import feed, jobs, migrate
from headrace_shared.store.pool import Connection, Pool, connect
from headrace_shared.store.sql import Statements
from headrace_shared.testing.clock import Clock

pytestmark = pytest.mark.conformance

LATEST = migrate.migrations()[-1].version
WEEK = timedelta(days=7)
RANDOM = re.compile("restrict|pg_attver")


def statements() -> list[tuple[str, str, str]]:
    packages = ("headrace_shared.store", "headrace_producer.chaos")
    found = [(package, entry.name) for package in packages for entry in files(package).iterdir()]
    named = sorted(one for one in found if one[1].endswith(".sql"))
    return [(package, file, name) for package, file in named for name in Statements(file, package)]


async def add_job(pool: Pool, job_id: JobId | None = None) -> JobId:
    job = NewJob(
        id=job_id or new_job_id(),
        tenant=Tenant("acme"),
        lane=Lane("default"),
        route=RouteName("gpt-4o-mini"),
        endpoint=Endpoint.CHAT_COMPLETIONS,
        body=b"{}",
        max_attempts=6,
    )
    inserted = await jobs.insert_jobs(pool, [job], configuration=0, keep_keys=WEEK)
    assert inserted
    return inserted[0].id


async def add_call(pool: Pool, job_id: JobId) -> None:
    await pool.execute(
        "INSERT INTO headrace.calls (job_id, run, call, tenant, endpoint, provider, model, hold_id,"
        " held_nano, held_at, scopes, epoch, price_version, opened_at)"
        " VALUES ($1, 1, 1, 'acme', '', 'openai', 'm', '', 9, now(), '{global}', 1, '', now())",
        job_id,
    )


@asynccontextmanager
async def connected(url: str) -> AsyncGenerator[Connection]:
    connection = await connect(url)
    try:
        yield connection
    finally:
        await connection.close()


async def dump(url: str) -> list[str]:
    """The schema as pg_dump writes it, and what the migrations table says."""
    command = [str(binaries.postgres("pg_dump")), "--schema-only", "--no-owner", "--schema=headrace", url]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    written, _ = await process.communicate()
    assert process.returncode == 0
    # Some versions put random numbers into it: a word that guards the file, a mark on columns.
    lines = [line for line in written.decode().splitlines() if not RANDOM.search(line)]
    async with connected(url) as connection:
        rows = await connection.fetch("SELECT version, name, checksum FROM headrace.migrations ORDER BY 1")
    return [*lines, *map(repr, rows)]


async def partition_of(pool: Pool, job_id: JobId) -> str:
    return str(await pool.fetchval("SELECT tableoid::regclass FROM headrace.jobs WHERE id = $1", job_id))


@pytest.mark.parametrize(("package", "file", "name"), statements())
async def test_every_statement_fits_the_schema(pool: Pool, package: str, file: str, name: str) -> None:
    async with pool.acquire() as connection:
        await connection.prepare(Statements(file, package)[name])


@pytest.mark.parametrize(
    ("possible", "impossible"),
    [
        ("run = 1", "state = 'paused'"),
        ("state = 'cancelled', ended_at = now()", "state = 'cancelled'"),
        ("attempts = 1", "ended_at = now()"),
        ("state = 'running', lease_until = now(), worker = 'w'", "state = 'running', worker = 'w'"),
        ("state = 'running', lease_until = now(), worker = 'w'", "state = 'running', lease_until = now()"),
        (
            "state = 'succeeded', ended_at = now(), result_run = 1, result_call = 1",
            "state = 'succeeded', ended_at = now()",
        ),
        (
            "state = 'failed', ended_at = now(), error_class = 'refused', error = 'no'",
            "state = 'failed', ended_at = now()",
        ),
        ("crashes = 2", "result_run = 1, result_call = 1"),
        ("run_at = now()", "lease_until = now(), worker = 'w'"),
        ("max_attempts = 1", "max_attempts = 0"),
        ("batch_id = gen_random_uuid(), line = 1", "batch_id = gen_random_uuid(), line = NULL"),
    ],
)
async def test_a_job_cannot_be_in_an_impossible_state(pool: Pool, possible: str, impossible: str) -> None:
    first, second = await add_job(pool), await add_job(pool)
    await pool.execute(f"UPDATE headrace.jobs SET {possible} WHERE id = $1", first)  # noqa: S608
    with pytest.raises(asyncpg.CheckViolationError):
        await pool.execute(f"UPDATE headrace.jobs SET {impossible} WHERE id = $1", second)  # noqa: S608


@pytest.mark.parametrize(
    ("possible", "impossible"),
    [
        ("state = 'failed', ended_at = now()", "state = 'failed'"),
        ("state = 'answered', ended_at = now(), answer = '{}'", "state = 'answered', ended_at = now()"),
        (
            "state = 'answered', ended_at = now(), answer = '{}', cost_nano = 1",
            "state = 'failed', ended_at = now(), cost_nano = 1",
        ),
        (
            "state = 'suspense', ended_at = now(), suspense_nano = 1",
            "state = 'answered', ended_at = now(), answer = '{}', suspense_nano = 1",
        ),
        ("held_nano = 0", "held_nano = -1"),
        ("prompt_tokens = 1", "prompt_tokens = -1"),
    ],
)
async def test_a_call_cannot_be_in_an_impossible_state(pool: Pool, possible: str, impossible: str) -> None:
    first, second = await add_job(pool), await add_job(pool)
    await add_call(pool, first)
    await add_call(pool, second)
    await pool.execute(f"UPDATE headrace.calls SET {possible} WHERE job_id = $1", first)  # noqa: S608
    with pytest.raises(asyncpg.CheckViolationError):
        await pool.execute(f"UPDATE headrace.calls SET {impossible} WHERE job_id = $1", second)  # noqa: S608


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO headrace.budgets VALUES ('team:a', 'total', 1, 'wait', now())",
        "INSERT INTO headrace.budgets VALUES ('tenant:', 'total', 1, 'wait', now())",
        "INSERT INTO headrace.budgets VALUES ('global', 'year', 1, 'wait', now())",
        "INSERT INTO headrace.budgets VALUES ('global', 'day', -1, 'wait', now())",
        "INSERT INTO headrace.budgets VALUES ('global', 'day', 9000000000000001, 'wait', now())",
        "INSERT INTO headrace.money (only_row) VALUES (false)",
        "INSERT INTO headrace.clock (only_row) VALUES (false)",
    ],
)
async def test_a_budget_is_one_that_can_be_counted(pool: Pool, sql: str) -> None:
    await pool.execute("INSERT INTO headrace.budgets VALUES ('tenant:a', 'month', 1, 'reject', now())")
    with pytest.raises(asyncpg.CheckViolationError):
        await pool.execute(sql)


async def test_many_may_migrate_at_once_and_again(empty_postgres_url: str, postgres_url: str) -> None:
    async with AsyncExitStack() as stack:
        connections = [await stack.enter_async_context(connected(empty_postgres_url)) for _ in range(8)]
        applied = await asyncio.gather(*(migrate.migrate(each) for each in connections))
        names = [name for each in applied for name in each]
        assert sorted(names) == [migration.name for migration in migrate.migrations()]
        assert await migrate.migrate(connections[0]) == []
    assert await dump(empty_postgres_url) == await dump(postgres_url)


@pytest.mark.parametrize("version", [migration.version for migration in migrate.migrations()])
async def test_an_upgrade_ends_where_an_installation_does(
    empty_postgres_url: str, postgres_url: str, version: int
) -> None:
    async with connected(empty_postgres_url) as connection:
        await migrate.migrate(connection, up_to=version)
        assert await migrate.schema_version(connection) == version
        await migrate.migrate(connection)
    assert await dump(empty_postgres_url) == await dump(postgres_url)


async def test_a_schema_that_is_too_old_is_told_apart(empty_postgres_url: str) -> None:
    async with connected(empty_postgres_url) as connection:
        with pytest.raises(StoreNotMigrated) as refused:
            await migrate.check(connection)
        assert str(refused.value) == (
            f"The database has schema version 0, this code needs {LATEST}: run 'headrace migrate'."
        )
        await migrate.migrate(connection)
        await migrate.check(connection)
        newer = "INSERT INTO headrace.migrations (version, name, checksum) VALUES ($1, 'later', '')"
        await connection.execute(newer, LATEST + 1)
        await migrate.check(connection)
        await connection.execute("DELETE FROM headrace.migrations WHERE version >= $1", LATEST)
        with pytest.raises(StoreNotMigrated):
            await migrate.check(connection)


async def test_a_migration_that_was_edited_afterwards_is_refused(pool: Pool) -> None:
    async with pool.acquire() as connection:
        await connection.execute("UPDATE headrace.migrations SET checksum = 'other' WHERE version = 1")
        with pytest.raises(InvalidConfiguration, match="0001_initial: was applied"):
            await migrate.migrate(connection)


async def test_a_job_lands_in_the_week_of_its_id(pool: Pool, clock: Clock) -> None:
    found: list[str] = []
    for _ in range(4):
        found.append(await partition_of(pool, await add_job(pool)))
        expected = "SELECT 'headrace.jobs_' || to_char(headrace.now() AT TIME ZONE 'UTC', 'IYYY\"w\"IW')"
        assert found[-1] == await pool.fetchval(expected)
        await clock.advance(WEEK)
    assert len(set(found)) == 4
    assert await pool.fetchval("SELECT count(*) FROM ONLY headrace.jobs_default") == 0


@pytest.mark.parametrize("minutes", [6, -6])
async def test_an_id_of_another_time_is_refused(pool: Pool, clock: Clock, minutes: int) -> None:
    early, late = new_job_id(), new_job_id()
    await clock.advance(timedelta(minutes=4))
    await add_job(pool, early)
    await clock.advance(timedelta(minutes=minutes - 4))
    with pytest.raises(InvalidRequest, match="set this machine's clock"):
        await add_job(pool, late)


@pytest.mark.parametrize("under_way", ["job", "suspense"])
async def test_a_week_is_kept_while_it_holds_anything_open(pool: Pool, clock: Clock, under_way: str) -> None:
    ended = await add_job(pool)
    await jobs.cancel_job(pool, ended)
    await clock.advance(WEEK)
    kept = await add_job(pool)
    await add_call(pool, kept)
    if under_way == "suspense":
        await jobs.cancel_job(pool, kept)
        await pool.execute("UPDATE headrace.calls SET state = 'suspense', ended_at = now()")
    else:
        await pool.execute("UPDATE headrace.calls SET state = 'failed', ended_at = now()")
    await clock.advance(timedelta(days=60))
    await feed.make_partitions(pool)

    week = (await partition_of(pool, kept)).removeprefix("headrace.jobs_")
    dropped = await feed.drop_partitions(pool, older_than=timedelta(days=30))
    assert week not in dropped
    assert len(dropped) == 4
    assert await jobs.get_job(pool, ended) is None
    assert await jobs.get_job(pool, kept)

    await jobs.cancel_job(pool, kept)
    await pool.execute("UPDATE headrace.calls SET state = 'failed'")
    assert await feed.drop_partitions(pool, older_than=timedelta(days=30)) == [week]
    assert await jobs.get_job(pool, kept) is None


async def test_partitions_may_be_made_by_many_at_once(pool: Pool, clock: Clock) -> None:
    await clock.advance(timedelta(days=70))
    await asyncio.gather(*(feed.make_partitions(pool) for _ in range(8)))
    job_id = await add_job(pool)
    assert await partition_of(pool, job_id) != "headrace.jobs_default"
