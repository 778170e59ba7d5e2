"""The doctor says what is wrong with servers, against servers that are made wrong."""

import asyncio
import json
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

import pytest

from headrace_producer import cli
from headrace_shared.dispatch.connection import Redis
from headrace_shared.doctor import Finding, Level, examine
from headrace_shared.doctor.redis import examine_redis
from headrace_shared.embedded import EmbeddedServers, embedded_servers
from headrace_shared.errors import StoreUnavailable
from headrace_shared.ids import WorkerId
from headrace_shared.settings import Settings, load_settings
from headrace_shared.store import feed, migrate
from headrace_shared.store.pool import Pool, connect
from headrace_shared.testing.clock import Clock, script
from headrace_shared.testing.jobs import eventually

PASSWORD = "s3cret/+ö"


async def level_of(check: str, postgres_url: str, redis_url: str, **given: object) -> Finding:
    findings = await examine(postgres_url, redis_url, load_settings(**given))
    (found,) = [one for one in findings if one.check == check]
    return found


def levels(findings: Iterable[Finding]) -> dict[str, Level]:
    return {one.check: one.level for one in findings if one.level is not Level.OK}


@pytest.fixture
async def durable(tmp_path: Path) -> AsyncIterator[EmbeddedServers]:
    """Servers as `headrace up` starts them."""
    async with embedded_servers(tmp_path) as servers:
        connection = await connect(servers.postgres_url)
        await migrate.migrate(connection)
        await connection.close()
        yield servers


async def run(monkeypatch: pytest.MonkeyPatch, servers: EmbeddedServers, *arguments: str) -> int:
    monkeypatch.setenv("HEADRACE_POSTGRES_URL", servers.postgres_url)
    monkeypatch.setenv("HEADRACE_REDIS_URL", servers.redis_url)
    return await asyncio.to_thread(cli.run, ["doctor", *arguments])


async def test_servers_that_are_well_have_no_problem_and_no_warning(
    durable: EmbeddedServers, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await run(monkeypatch, durable, "--json") == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [one for one in answer["checks"] if one["level"] != "ok"] == []
    assert (answer["problems"], answer["warnings"]) == (0, 0)
    assert len({one["check"] for one in answer["checks"]}) == len(answer["checks"]) == 17
    assert await run(monkeypatch, durable) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "0 problems, 0 warnings."


@pytest.mark.parametrize(
    ("setting", "value", "check", "level"),
    [
        ("appendonly", "no", "redis persistence", Level.WARNING),
        ("maxmemory-policy", "allkeys-lru", "redis eviction", Level.PROBLEM),
        ("maxmemory-policy", "volatile-ttl", "redis eviction", Level.PROBLEM),
    ],
)
async def test_a_redis_that_may_lose_keys_is_said_to(
    durable: EmbeddedServers, setting: str, value: str, check: str, level: Level
) -> None:
    redis = Redis(durable.redis_url)
    await redis.administer("CONFIG", "SET", setting, value)
    found, _ = await examine_redis(redis)
    await redis.close()
    assert levels(found) == {check: level}


async def test_a_replica_is_no_redis_to_write_to(durable: EmbeddedServers) -> None:
    redis = Redis(durable.redis_url)
    await redis.administer("REPLICAOF", "127.0.0.1", "1")
    found, _ = await examine_redis(redis)
    await redis.administer("REPLICAOF", "NO", "ONE")
    await redis.close()
    assert levels(found) == {"redis role": Level.PROBLEM}


@asynccontextmanager
async def user(url: str, *rules: str) -> AsyncGenerator[str]:
    """The URL of a Redis for a user who may do so much; the user is gone afterwards."""
    redis = Redis(url)
    await redis.administer("ACL", "SETUSER", "limited", "reset", "on", f">{PASSWORD}", *rules)
    try:
        parts = urlsplit(url)
        yield parts._replace(netloc=f"limited:{quote(PASSWORD, safe='')}@{parts.netloc}").geturl()
    finally:
        await redis.administer("ACL", "DELUSER", "limited")
        await redis.close()


@pytest.mark.parametrize(
    ("rules", "level", "says"),
    [
        (["~headrace:*", "&headrace:*", "+@all"], Level.OK, "all that is needed"),
        (["~headrace:*", "&headrace:*", "+@all", "-blpop", "-hincrby"], Level.PROBLEM, "BLPOP"),
        (["~other:*", "&*", "+@all"], Level.PROBLEM, "headrace:bell-feeder"),
        (["~headrace:*", "resetchannels", "+@all"], Level.PROBLEM, "PUBLISH"),
        (["~headrace:*", "&headrace:*", "+@all", "-acl"], Level.WARNING, "Cannot tell"),
    ],
)
async def test_what_the_acl_refuses_is_named(
    redis_url: str, rules: list[str], level: Level, says: str
) -> None:
    async with user(redis_url, *rules) as url:
        redis = Redis(url)
        found, _ = await examine_redis(redis)
        await redis.close()
    (permissions,) = [one for one in found if one.check == "redis permissions"]
    assert permissions.level is level
    assert says in permissions.says


async def test_no_password_is_printed(postgres_url: str, redis_url: str) -> None:
    async with user(redis_url, "~headrace:*", "+ping") as url:
        wrong = url.replace(quote(PASSWORD, safe=""), "another-one")
        for redis in (url, wrong):
            findings = await examine(with_password(postgres_url), redis, Settings())
            said = " ".join(one.says for one in findings)
            assert "redis reachable" in levels(findings)
            assert PASSWORD not in said
            assert quote(PASSWORD, safe="") not in said
            assert "another-one" not in said


def with_password(url: str) -> str:
    parts = urlsplit(url)
    name, _, host = parts.netloc.rpartition("@")
    return parts._replace(netloc=f"{name.partition(':')[0]}:{quote(PASSWORD, safe='')}@{host}").geturl()


async def test_commits_that_a_crash_loses_are_a_problem(
    pool: Pool, postgres_url: str, redis_url: str
) -> None:
    setting, check = "synchronous_commit", "postgres synchronous_commit"
    database = urlsplit(postgres_url).path[1:]
    await pool.execute(f"ALTER DATABASE {database} SET {setting} = off")
    assert (await level_of(check, postgres_url, redis_url)).level is Level.PROBLEM
    await pool.execute(f"ALTER DATABASE {database} SET {setting} = on")
    assert (await level_of(check, postgres_url, redis_url)).level is Level.OK


@pytest.mark.parametrize(
    ("setting", "check"), [("fsync", "postgres fsync"), ("autovacuum", "postgres autovacuum")]
)
async def test_a_server_that_is_set_to_be_fast_and_careless_is_a_problem(
    durable: EmbeddedServers, setting: str, check: str
) -> None:
    connection = await connect(durable.postgres_url)
    try:
        await connection.execute(f"ALTER SYSTEM SET {setting} = off")
        await connection.execute("SELECT pg_reload_conf()")
        await eventually(lambda: connection.fetchval(f"SHOW {setting}"), lambda found: found == "off")
    finally:
        await connection.close()
    findings = await examine(durable.postgres_url, durable.redis_url, Settings())
    assert levels(findings) == {check: Level.PROBLEM}


async def test_a_database_without_the_schema_says_what_to_run(
    empty_postgres_url: str, redis_url: str
) -> None:
    found = await level_of("postgres schema", empty_postgres_url, redis_url)
    assert found.level is Level.PROBLEM
    assert "run 'headrace migrate'" in found.says


@pytest.mark.parametrize(
    ("weeks", "level"),
    [(0, Level.OK), (1, Level.OK), (3, Level.WARNING), (4, Level.PROBLEM), (9, Level.PROBLEM)],
)
async def test_partitions_that_run_out_are_seen_in_time(
    postgres_url: str, redis_url: str, clock: Clock, weeks: int, level: Level
) -> None:
    await clock.advance(timedelta(weeks=weeks))
    assert (await level_of("postgres partitions", postgres_url, redis_url)).level is level


@pytest.mark.parametrize(
    ("seconds", "level"),
    [(0, Level.OK), (-45, Level.OK), (65, Level.WARNING), (-65, Level.WARNING), (301, Level.PROBLEM)],
)
async def test_a_clock_of_this_machine_that_is_wrong_is_seen(
    pool: Pool, postgres_url: str, redis_url: str, seconds: int, level: Level
) -> None:
    await pool.execute("UPDATE headrace.clock SET shift = make_interval(secs => $1)", float(seconds))
    assert (await level_of("clock of this machine", postgres_url, redis_url)).level is level


@pytest.mark.parametrize(
    ("milliseconds", "level"), [(4_500, Level.OK), (6_000, Level.PROBLEM), (-6_000, Level.PROBLEM)]
)
async def test_clocks_of_the_servers_that_differ_are_seen(
    postgres_url: str, redis_url: str, redis: Redis, milliseconds: int, level: Level
) -> None:
    await redis.evaluate(script("return redis.call('SET', 'headrace:clock', ARGV[1])"), (), [milliseconds])
    assert (await level_of("clock of redis", postgres_url, redis_url)).level is level


async def test_more_workers_than_connections_are_seen(pool: Pool, postgres_url: str, redis_url: str) -> None:
    assert (await level_of("postgres connections", postgres_url, redis_url)).level is Level.OK
    for number in range(200):
        await feed.register_worker(
            pool, WorkerId(f"w{number}"), host="h", slots=1, lanes=(), alive=timedelta(minutes=1)
        )
    found = await level_of("postgres connections", postgres_url, redis_url)
    assert found.level is Level.PROBLEM
    assert "200 live workers" in found.says


async def test_a_configuration_that_cannot_be_read_is_a_problem(
    pool: Pool, postgres_url: str, redis_url: str
) -> None:
    await pool.execute(
        "INSERT INTO headrace.configurations (document, source, applied_at)"
        " VALUES ('{\"nonsense\": 1}', 'test', now())"
    )
    assert (await level_of("configuration", postgres_url, redis_url)).level is Level.PROBLEM


async def test_servers_that_are_away_are_problems_and_the_others_are_examined(
    durable: EmbeddedServers, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    assert await run(monkeypatch, replace(durable, redis_url=f"redis://{nobody}"), "--json") == 1
    checks = {one["check"]: one["level"] for one in json.loads(capsys.readouterr().out)["checks"]}
    assert (checks["redis reachable"], checks["postgres schema"]) == ("problem", "ok")
    away = replace(durable, postgres_url=f"postgresql://{nobody}/x")
    assert await run(monkeypatch, away, "--json") == 1
    checks = {one["check"]: one["level"] for one in json.loads(capsys.readouterr().out)["checks"]}
    assert (checks["postgres reachable"], checks["redis eviction"]) == ("problem", "ok")


@pytest.mark.parametrize(
    ("variable", "value"),
    [("HEADRACE_REDIS_URL", ""), ("HEADRACE_REDIS_URL", "http://x"), ("HEADRACE_POSTGRES_URL", "mysql://x")],
)
async def test_settings_that_are_wrong_are_refused(
    durable: EmbeddedServers,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variable: str,
    value: str,
) -> None:
    field = variable.removeprefix("HEADRACE_").lower()
    assert await run(monkeypatch, replace(durable, **{field: value})) == 2
    assert variable in capsys.readouterr().err


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


@pytest.fixture
async def pooled(direct_url: str) -> AsyncIterator[str]:
    """The test's database behind a PgBouncer that pools by transaction."""
    program = shutil.which("pgbouncer", path=f"{os.defpath}:/usr/sbin:/usr/local/bin")
    if program is None:
        pytest.skip("PgBouncer is not installed")
    with tempfile.TemporaryDirectory(prefix="headrace-pooler-") as folder:
        port = free_port()
        process = start_pooler(program, folder, direct_url, port)
        parts = urlsplit(direct_url)
        url = f"postgresql://{parts.username}@127.0.0.1:{port}{parts.path}"
        await eventually(lambda: answers(url), bool)
        yield url
        process.terminate()
        process.wait(timeout=10)


def start_pooler(program: str, folder: str, server_url: str, port: int) -> subprocess.Popen[bytes]:
    parts = urlsplit(server_url)
    host = parse_qs(parts.query).get("host", [parts.hostname or "localhost"])[0]
    users, file = Path(folder) / "users.txt", Path(folder) / "pgbouncer.ini"
    users.write_text(f'"{parts.username}" "{parts.password or ""}"\n')
    file.write_text(
        f"[databases]\n* = host={host} port={parts.port or 5432}\n[pgbouncer]\n"
        f"listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
        f"auth_type = trust\nauth_file = {users}\npool_mode = transaction\n"
    )
    Path(folder).chmod(0o755)
    user = None
    if os.geteuid() == 0:
        # It does not run as root; whoever owns the server's socket may use it.
        user = (Path(host).stat().st_uid if Path(host).exists() else 0) or "nobody"
    nowhere = subprocess.DEVNULL
    return subprocess.Popen([program, "-q", str(file)], user=user, stdout=nowhere, stderr=nowhere)  # noqa: S603


async def answers(url: str) -> bool:
    try:
        connection = await connect(url)
    except StoreUnavailable:
        return False
    await connection.close()
    return True


async def test_a_pooler_that_was_not_told_of_is_found(pooled: str, redis_url: str) -> None:
    found = await level_of("postgres pooler", pooled, redis_url)
    assert found.level is Level.PROBLEM
    assert "HEADRACE_POOLER=true" in found.says


async def test_a_pooler_that_was_told_of_is_used(pooled: str, direct_url: str, redis_url: str) -> None:
    findings = await examine(pooled, redis_url, load_settings(pooler=True, listen_url=direct_url))
    said = {one.check: (one.level, one.says) for one in findings}
    assert said["postgres pooler"] == (Level.OK, "Statements pass the pooler.")
    assert said["postgres notifications"] == (Level.OK, "The feeder listens at HEADRACE_LISTEN_URL.")
    unheard = await level_of("postgres notifications", pooled, redis_url, pooler=True)
    assert (unheard.level, "once a second" in unheard.says) == (Level.OK, True)
    deaf = await level_of("postgres notifications", pooled, redis_url, pooler=True, listen_url=pooled)
    assert deaf.level is Level.PROBLEM
