"""Worker processes that are killed, stopped, and left alone by their servers: every job ends once."""

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from worker_processes import ARQ, HEADRACE, gone, worker

from headrace_shared.dispatch.connection import Redis
from headrace_shared.dispatch.dispatch import Dispatch
from headrace_shared.embedded import EmbeddedServers, embedded_servers
from headrace_shared.ids import JobId, Tenant
from headrace_shared.job import Ending, JobState
from headrace_shared.store import migrate
from headrace_shared.store.pool import Pool, connect, open_pool
from headrace_shared.testing.behaviour import Behaviour
from headrace_shared.testing.clock import script
from headrace_shared.testing.jobs import Jobs, eventually
from headrace_shared.testing.simulated_provider import SimulatedProvider
from headrace_workers.testing import running_worker

SLOW = Behaviour(latency=timedelta(milliseconds=300), jitter=0.5)


@pytest.fixture
def jobs(pool: Pool, dispatch: Dispatch) -> Jobs:
    return Jobs(pool, dispatch)


async def running(jobs: Jobs, at_least: int) -> int:
    """Wait until so many jobs run."""
    query = "SELECT count(*) FROM headrace.jobs WHERE state = 'running'"
    return await eventually(lambda: jobs.pool.fetchval(query), lambda found: found >= at_least)


async def each_once(jobs: Jobs, provider: SimulatedProvider, ids: Sequence[JobId]) -> list[Ending]:
    """Every job has one result, and the ledger has every call that the provider answered."""
    endings = await jobs.ended(ids)
    assert {ending.job.state for ending in endings} == {JobState.SUCCEEDED}
    assert all(ending.answer is not None for ending in endings)
    states = await jobs.pool.fetch("SELECT state, count(*) FROM headrace.calls GROUP BY state")
    found = {str(row["state"]): int(row["count"]) for row in states}
    assert found.get("answered", 0) == len(ids)
    assert set(found) <= {"answered", "suspense"}
    total = provider.books.total
    assert len(ids) <= total.requests <= len(ids) + found.get("suspense", 0)
    assert await jobs.spend() == await jobs.ledger()
    return endings


@pytest.mark.usefixtures("environment")
async def test_the_jobs_of_a_killed_worker_end_elsewhere(jobs: Jobs, provider: SimulatedProvider) -> None:
    provider.behave(SLOW)
    ids = await jobs.add(60)
    async with worker() as victim, worker():
        await running(jobs, 10)
        victim.send_signal(signal.SIGKILL)
        await victim.wait()
        endings = await each_once(jobs, provider, ids)
    assert {ending.job.attempts for ending in endings} == {0}
    assert max(ending.job.crashes for ending in endings) <= 1


@pytest.mark.usefixtures("environment")
async def test_a_stopped_worker_lets_its_jobs_end(jobs: Jobs, provider: SimulatedProvider) -> None:
    provider.behave(SLOW)
    ids = await jobs.add(30)
    async with worker(drain_seconds=60) as process:
        await running(jobs, 8)
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 30) == 0
    rows = await jobs.pool.fetch("SELECT state, run, crashes, attempts FROM headrace.jobs")
    assert {str(row["state"]) for row in rows} == {"queued", "succeeded"}
    assert {(row["crashes"], row["attempts"]) for row in rows} == {(0, 0)}
    assert {row["run"] for row in rows} == {0, 1}
    assert await jobs.pool.fetchval("SELECT count(*) FROM headrace.calls WHERE state <> 'answered'") == 0
    assert await jobs.pool.fetchval("SELECT count(*) FROM headrace.workers") == 0
    async with running_worker(concurrency=30):
        await each_once(jobs, provider, ids)


@pytest.mark.usefixtures("environment")
async def test_what_does_not_end_in_time_is_given_back_at_once(
    jobs: Jobs, provider: SimulatedProvider
) -> None:
    provider.behave(Behaviour(hang=1))
    await jobs.add(4)
    async with worker(drain_seconds=0, lease_seconds=600) as process:
        await provider.books.until(lambda: provider.books.in_flight == 4)
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 30) == 0
    await given_back(jobs)


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("command", [HEADRACE, ARQ], ids=["headrace", "arq"])
async def test_a_second_signal_ends_the_grace(
    jobs: Jobs, provider: SimulatedProvider, command: Sequence[str]
) -> None:
    """arq's own command starts the same worker."""
    provider.behave(Behaviour(hang=1))
    await jobs.add(4)
    async with worker(command, drain_seconds=600, lease_seconds=600) as process:
        await provider.books.until(lambda: provider.books.in_flight == 4)
        process.terminate()
        # It has understood when it claims nothing more.
        (late,) = await jobs.add(tenant=Tenant("late"))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(process.wait(), 0.5)
        assert (await jobs.row(late))["state"] == "queued"
        await jobs.pool.execute("DELETE FROM headrace.jobs WHERE id = $1", late)
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 30) == 0
    await given_back(jobs)


async def given_back(jobs: Jobs) -> None:
    """Nothing has ended; it cost no attempt and no crash, and nobody waits for the lease."""
    rows = await jobs.pool.fetch("SELECT state, run, waiting_for, attempts, crashes FROM headrace.jobs")
    assert {tuple(row.values()) for row in rows} == {("queued", 1, "shutdown", 0, 0)}
    calls = await jobs.pool.fetch("SELECT state FROM headrace.calls")
    assert [call["state"] for call in calls] == ["suspense"] * len(rows)


@pytest.mark.usefixtures("environment")
async def test_everything_in_redis_is_lost(jobs: Jobs, provider: SimulatedProvider, redis: Redis) -> None:
    provider.behave(SLOW)
    ids = await jobs.add(60)
    async with worker() as process:
        await running(jobs, 8)
        await redis.evaluate(script("return redis.call('FLUSHDB')"))
        endings = await each_once(jobs, provider, ids)
        assert process.returncode is None
    assert {(ending.job.attempts, ending.job.crashes) for ending in endings} == {(0, 0)}


# Servers of a test's own, to be killed.


@pytest.fixture
async def own_servers(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[EmbeddedServers, Path]]:
    with TemporaryDirectory(prefix="headrace-test-") as name:
        folder = Path(name)
        async with embedded_servers(folder) as servers:
            connection = await connect(servers.postgres_url)
            await migrate.migrate(connection)
            await connection.close()
            monkeypatch.setenv("HEADRACE_POSTGRES_URL", servers.postgres_url)
            monkeypatch.setenv("HEADRACE_REDIS_URL", servers.redis_url)
            yield servers, folder


@asynccontextmanager
async def own_jobs(servers: EmbeddedServers) -> AsyncGenerator[Jobs]:
    pool, redis = await open_pool(servers.postgres_url), Redis(servers.redis_url)
    try:
        yield Jobs(pool, Dispatch(redis))
    finally:
        await pool.close()
        await redis.close()


def process_of(pid_file: Path) -> int:
    return int(pid_file.read_text().splitlines()[0])


async def test_redis_is_killed_and_comes_back_empty(
    own_servers: tuple[EmbeddedServers, Path], provider: SimulatedProvider
) -> None:
    provider.behave(SLOW)
    servers, folder = own_servers
    async with own_jobs(servers) as jobs:
        ids = await jobs.add(60)
        async with worker() as process:
            await running(jobs, 8)
            pid = process_of(folder / ".headrace/valkey/valkey.pid")
            os.kill(pid, signal.SIGKILL)
            await gone(pid)
            for path in (folder / ".headrace/valkey").glob("appendonlydir/*"):
                path.unlink()
            more = await jobs.add(10, push=False)
            # Whoever comes in starts what has crashed, under the same address.
            async with embedded_servers(folder):
                endings = await each_once(jobs, provider, [*ids, *more])
            assert process.returncode is None
    assert {ending.job.attempts for ending in endings} == {0}


async def test_postgres_is_restarted_in_the_middle(
    own_servers: tuple[EmbeddedServers, Path], provider: SimulatedProvider
) -> None:
    provider.behave(SLOW)
    servers, folder = own_servers
    async with own_jobs(servers) as jobs:
        ids = await jobs.add(60)
        async with worker() as process:
            await running(jobs, 8)
            pid = process_of(folder / ".headrace/postgres/postmaster.pid")
            os.kill(pid, signal.SIGQUIT)
            await gone(pid)
            async with embedded_servers(folder):
                endings = await each_once(jobs, provider, ids)
            assert process.returncode is None
    assert {ending.job.attempts for ending in endings} == {0}


async def test_postgres_ends_every_session_at_once(
    own_servers: tuple[EmbeddedServers, Path], provider: SimulatedProvider
) -> None:
    provider.behave(SLOW)
    async with own_jobs(own_servers[0]) as jobs:
        ids = await jobs.add(60)
        async with worker() as process:
            await running(jobs, 8)
            for _ in range(3):
                await jobs.pool.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE pid <> pg_backend_pid() AND datname = current_database()"
                )
                await asyncio.sleep(0.2)
            await each_once(jobs, provider, ids)
            assert process.returncode is None
