"""What is due in the store and is not in its window gets there, whatever was lost on the way."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import cast

import pytest

from headrace_shared.dispatch import keys
from headrace_shared.dispatch.connection import Redis
from headrace_shared.dispatch.dispatch import Dispatch, Entry
from headrace_shared.ids import JobId, Lane, RouteName, Tenant, WorkerId, new_job_id
from headrace_shared.job import JobState, Queue
from headrace_shared.outcome import Snoozed, WaitReason
from headrace_shared.store import claims, feed, runs
from headrace_shared.store.pool import Pool
from headrace_shared.testing.behaviour import Behaviour
from headrace_shared.testing.clock import Clock, script
from headrace_shared.testing.jobs import LANE, MODEL, TENANT, Jobs, eventually
from headrace_shared.testing.simulated_provider import SimulatedProvider
from headrace_shared.testing.spending import flush
from headrace_workers.feeder import Feeder
from headrace_workers.leadership import Leadership
from headrace_workers.testing import running_worker

pytestmark = [pytest.mark.conformance, pytest.mark.usefixtures("environment")]

WORKER = WorkerId("w")
QUEUE = Queue(LANE, RouteName(MODEL), TENANT)
MINUTE = timedelta(minutes=1)
LEASE = timedelta(seconds=30)


@pytest.fixture
def jobs(pool: Pool, dispatch: Dispatch) -> Jobs:
    return Jobs(pool, dispatch)


async def window(redis: Redis, queue: Queue = QUEUE) -> list[str]:
    """The ids in a queue's window, in the order they are due."""
    members = await redis.evaluate(
        script("return redis.call('ZRANGE', ARGV[1], 0, -1)"), (), [keys.QUEUE + keys.queue_name(queue)]
    )
    return [member.decode() for member in cast("list[bytes]", members)]


def texts(ids: list[JobId]) -> list[str]:
    return [str(job_id) for job_id in sorted(ids)]


@asynccontextmanager
async def feeding(feeder: Feeder, pool: Pool) -> AsyncGenerator[None]:
    """Let a feeder lead, as a worker does."""
    leadership = Leadership(pool, WORKER, "feeder", term=LEASE, turn=feeder.turn, wake=feeder.wake)
    tasks = [asyncio.create_task(leadership.run()), asyncio.create_task(feeder.listen())]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_commit_of_the_callers_own_is_heard(
    redis: Redis, jobs: Jobs, direct_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, dispatch = jobs.pool, jobs.dispatch
    monkeypatch.setattr("headrace_workers.feeder.INTERVAL", timedelta(seconds=5))
    async with feeding(Feeder(pool, dispatch, listen_url=direct_url), pool):
        await eventually(lambda: listeners(pool), lambda found: found == 1)
        async with pool.acquire() as connection, connection.transaction():
            ids = await jobs.add(3, push=False, database=connection, notify=True)
            assert await window(redis) == []
        soon = timedelta(seconds=3)
        await eventually(lambda: window(redis), lambda found: found == texts(ids), within=soon)


async def listeners(pool: Pool) -> int:
    """How many sessions wait for a notification; the feeder's own is idle by then."""
    return int(
        await pool.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND query ILIKE 'LISTEN%' AND state = 'idle'"
        )
    )


async def test_where_no_notification_passes_the_feeder_looks_for_itself(
    pool: Pool, redis: Redis, dispatch: Dispatch, jobs: Jobs
) -> None:
    async with feeding(Feeder(pool, dispatch, listen_url=None), pool):
        await eventually(lambda: leader(pool), lambda found: found == "w")
        ids = await jobs.add(3, push=False, notify=True)
        await eventually(lambda: window(redis), lambda found: found == texts(ids))


async def leader(pool: Pool) -> object:
    return await pool.fetchval("SELECT holder FROM headrace.leaders WHERE role = 'feeder'")


async def test_what_was_rolled_back_leaves_nothing(
    pool: Pool, redis: Redis, dispatch: Dispatch, jobs: Jobs
) -> None:
    feeder = Feeder(pool, dispatch, listen_url=None)
    async with pool.acquire() as connection:
        transaction = connection.transaction()
        await transaction.start()
        await jobs.add(push=False, database=connection, notify=True)
        await transaction.rollback()
    await feeder.turn()
    assert await window(redis) == []
    assert await pool.fetchval("SELECT count(*) FROM headrace.jobs") == 0


async def test_a_lost_push_is_made_up_for(jobs: Jobs, provider: SimulatedProvider) -> None:
    async with running_worker():
        ids = await jobs.add(5, push=False)
        endings = await jobs.ended(ids)
    assert {ending.job.state for ending in endings} == {JobState.SUCCEEDED}
    assert provider.books.total.requests == 5


async def test_a_window_is_filled_in_order_and_no_further(pool: Pool, redis: Redis, jobs: Jobs) -> None:
    ids = await jobs.add(25, push=False)
    dispatch = Dispatch(redis, window=10)
    feeder = Feeder(pool, dispatch, listen_url=None, window=10)
    await feeder.turn()
    assert await window(redis) == texts(ids)[:10]
    await feeder.turn()
    assert len(await window(redis)) == 10
    assert await redis.evaluate(script("return redis.call('SCARD', 'headrace:deep')")) == 1


async def test_a_deep_queue_rings_for_more_and_drains(
    pool: Pool, redis: Redis, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No look of the feeder's own is due: it comes because the window rings."""
    monkeypatch.setattr("headrace_workers.feeder.INTERVAL", timedelta(seconds=5))
    ids = await jobs.add(300, push=False)
    dispatch = Dispatch(redis, window=40)
    seen: set[JobId] = set()
    async with feeding(Feeder(pool, dispatch, listen_url=None, window=40), pool):
        async with asyncio.timeout(20):
            while len(seen) < len(ids):
                claim = await dispatch.claim(4, {LANE: 1}, LEASE, LEASE)
                claimed = [entry.id for entry in claim.entries]
                await pool.execute(
                    "UPDATE headrace.jobs SET state = 'cancelled', ended_at = headrace.now()"
                    " WHERE id = ANY($1::uuid[])",
                    claimed,
                )
                await dispatch.finish([(entry, None) for entry in claim.entries])
                seen.update(claimed)
                if not claimed:
                    await dispatch.wait_for_jobs([LANE], timedelta(seconds=1))
    assert seen == set(ids)


async def test_jobs_for_later_do_not_starve_those_that_are_due(pool: Pool, redis: Redis, jobs: Jobs) -> None:
    dispatch = Dispatch(redis, window=10)
    later = Jobs(pool, dispatch)
    await later.add(20, delay=MINUTE)
    due = await later.add(3, push=False)
    await Feeder(pool, dispatch, listen_url=None, window=10).turn()
    claim = await dispatch.claim(50, {LANE: 1}, LEASE, LEASE)
    assert [entry.id for entry in claim.entries] == sorted(due)


async def test_what_is_due_later_comes_when_it_is_due(
    pool: Pool, redis: Redis, dispatch: Dispatch, jobs: Jobs, clock: Clock
) -> None:
    ids = await jobs.add(3, push=False, delay=MINUTE)
    feeder = Feeder(pool, dispatch, listen_url=None)
    await feeder.turn()
    assert await window(redis) == []
    await clock.advance(MINUTE + timedelta(seconds=1))
    await feeder.turn()
    assert await window(redis) == texts(ids)


async def test_what_runs_is_not_fed(pool: Pool, redis: Redis, dispatch: Dispatch, jobs: Jobs) -> None:
    running, queued = await jobs.add(2, push=False)
    await pool.execute(
        "UPDATE headrace.jobs SET state = 'running', worker = 'w', lease_until = now() WHERE id = $1", running
    )
    await Feeder(pool, dispatch, listen_url=None).turn()
    assert await window(redis) == [str(queued)]


async def test_what_ends_while_a_wiped_dispatch_is_filled_is_leased_for_nobody(
    pool: Pool, redis: Redis, dispatch: Dispatch, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    (ends, runs_on) = [
        (await claims.claim_jobs(pool, [one], WORKER, LEASE)).jobs[0] for one in await jobs.add(2)
    ]
    read = feed.running_jobs

    async def overtaken(pool: Pool) -> list[tuple[Entry, timedelta]]:
        running = await read(pool)
        monkeypatch.setattr(feed, "running_jobs", read)
        end = runs.RunEnd(ends.id, ends.run, Snoozed(MINUTE, WaitReason.RETRY), 0)
        await runs.finish(pool, WORKER, 1, conclusions=[], attempts=[], ends=[end])
        await dispatch.finish([(Entry(QUEUE, ends.id), MINUTE)])
        return running

    await redis.evaluate(script("return redis.call('FLUSHDB')"))
    monkeypatch.setattr(feed, "running_jobs", overtaken)
    await Feeder(pool, dispatch, listen_url=None).turn()
    caps = await redis.evaluate(
        script("return redis.call('ZRANGE', ARGV[1], 0, -1)"), (), [f"{keys.RUNNING}tenant:{TENANT}"]
    )
    assert caps == [str(runs_on.id).encode()]


async def test_every_queue_is_seen(pool: Pool, redis: Redis, dispatch: Dispatch, jobs: Jobs) -> None:
    odd = [Tenant(name) for name in ("a", "a:b", "ä %", "zz")]
    queues = [Queue(Lane("batch"), RouteName("o/1:x"), tenant) for tenant in odd]
    for queue in queues:
        await jobs.add(model=queue.route, tenant=queue.tenant, lane=queue.lane, push=False)
    assert sorted(await feed.due_queues(pool), key=str) == sorted(queues, key=str)
    await Feeder(pool, dispatch, listen_url=None).turn()
    assert [len(await window(redis, queue)) for queue in queues] == [1, 1, 1, 1]


async def test_an_urgent_lane_overtakes_a_long_one(jobs: Jobs, provider: SimulatedProvider) -> None:
    provider.behave(Behaviour(latency=timedelta(milliseconds=5)))
    batch = await jobs.add(60, lane=Lane("batch"), push=False)
    urgent = await jobs.add(10, lane=Lane("interactive"), push=False)
    async with running_worker(concurrency=2):
        await jobs.ended([*batch, *urgent])
    ends = {job_id: (await jobs.row(job_id))["ended_at"] for job_id in (*batch, *urgent)}
    overtaken = sum(ends[job_id] > max(ends[one] for one in urgent) for job_id in batch)
    assert overtaken > 45


async def test_one_feeder_leads_and_another_takes_over(pool: Pool, clock: Clock) -> None:
    one, other = WorkerId("one"), WorkerId("other")
    assert await feed.lead(pool, "feeder", one, LEASE)
    assert not await feed.lead(pool, "feeder", other, LEASE)
    assert await feed.lead(pool, "reaper", other, LEASE)
    await clock.advance(LEASE + timedelta(seconds=1))
    assert await feed.lead(pool, "feeder", other, LEASE)
    assert not await feed.lead(pool, "feeder", one, LEASE)
    await feed.resign(pool, "feeder", one)
    assert not await feed.lead(pool, "feeder", one, LEASE)
    await feed.resign(pool, "feeder", other)
    assert await feed.lead(pool, "feeder", one, LEASE)


async def test_a_turn_that_breaks_is_not_the_last(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace_workers.leadership._CAMPAIGN", timedelta(milliseconds=10))
    turns, done = [1, 0], asyncio.Event()

    async def turn() -> timedelta:
        if turns:
            return timedelta(seconds=1 // (1 - turns.pop(0)))
        done.set()
        return timedelta(0)

    async def wake(_rest: timedelta) -> None:
        await asyncio.sleep(0)

    leadership = Leadership(pool, WORKER, "reaper", term=LEASE, turn=turn, wake=wake)
    task = asyncio.create_task(leadership.run())
    async with asyncio.timeout(10):
        await done.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_first_start_is_no_warning_and_a_lost_dispatch_is(
    pool: Pool, redis: Redis, jobs: Jobs, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "headrace_workers.feeder")
    feeder = Feeder(pool, jobs.dispatch, listen_url=None)
    await feeder.turn()
    await jobs.add(push=False)
    await feeder.turn()
    assert [one.levelname for one in caplog.records] == ["INFO"]
    await flush(redis)
    await feeder.turn()
    assert [one.levelname for one in caplog.records] == ["INFO", "WARNING"]


async def test_a_wiped_server_rings_at_the_first_claim_and_once(
    pool: Pool, redis: Redis, dispatch: Dispatch, jobs: Jobs
) -> None:
    feeder = Feeder(pool, dispatch, listen_url=None)
    await feeder.turn()
    assert (await dispatch.claim(1, {LANE: 1}, LEASE, LEASE)).entries == []
    assert await bell(redis) == 0
    ids = await jobs.add(3)
    await flush(redis)
    for _ in range(3):
        assert (await dispatch.claim(1, {LANE: 1}, LEASE, LEASE)).entries == []
    assert await bell(redis) == 1
    await feeder.turn()
    assert await window(redis) == texts(ids)
    await redis.wait_for([keys.FEEDER_BELL], 1)
    await dispatch.claim(1, {LANE: 1}, LEASE, LEASE)
    assert await bell(redis) == 0


async def test_another_server_behind_the_same_address_is_rung_for(
    redis: Redis, redis_url: str, dispatch: Dispatch
) -> None:
    await dispatch.begin_afresh()
    redis.run_id = "that of the server before"
    operator = Redis(redis_url)
    await operator.administer("CLIENT", "KILL", "TYPE", "normal")
    await operator.close()
    await redis.check()
    assert redis.run_id != "that of the server before"
    assert await bell(redis) == 1
    await redis.wait_for([keys.FEEDER_BELL], 1)
    await redis.evaluate(script("return redis.call('SET', KEYS[1], 'another')"), [keys.FED])
    await dispatch.claim(1, {LANE: 1}, LEASE, LEASE)
    assert await bell(redis) == 1


async def bell(redis: Redis) -> object:
    return await redis.evaluate(script("return redis.call('LLEN', ARGV[1])"), (), [keys.FEEDER_BELL])


async def test_an_old_snapshot_leaves_no_window_full_of_ended_jobs(
    pool: Pool, redis: Redis, jobs: Jobs
) -> None:
    dispatch = Dispatch(redis, window=10)
    others = Queue(LANE, RouteName(MODEL), Tenant("gone"))
    old = [(Entry(queue, new_job_id()), timedelta(0)) for queue in (QUEUE, others) for _ in range(10)]
    await dispatch.push(old)
    await redis.evaluate(script("return redis.call('SET', KEYS[1], 'of the snapshot')"), [keys.FED])
    ids = await jobs.add(3, push=False)
    await Feeder(pool, dispatch, listen_url=None, window=10).turn()
    assert await window(redis) == texts(ids)
    claim = await dispatch.claim(50, {LANE: 1}, LEASE, LEASE)
    assert [entry.id for entry in claim.entries] == sorted(ids)


async def test_one_turn_fills_long_and_short_queues_alike(pool: Pool, redis: Redis, jobs: Jobs) -> None:
    queues = {
        Queue(LANE, RouteName(MODEL), Tenant(f"t{number}")): count
        for number, count in enumerate([*range(1, 23), 600, 499, 500, 501])
    }
    for queue, count in queues.items():
        await jobs.add(count, tenant=queue.tenant, push=False)
    dispatch = Dispatch(redis)
    rest = await Feeder(pool, dispatch, listen_url=None).turn()
    assert await dispatch.due(list(queues)) == list(queues.values())
    assert rest <= timedelta(seconds=5)


async def test_the_feeder_does_not_rest_long_while_a_queue_has_more(
    pool: Pool, dispatch: Dispatch, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace_workers.feeder._DUTY", 10**6)
    feeder = Feeder(pool, Dispatch(dispatch.redis, window=10), listen_url=None, window=10)
    await jobs.add(1, push=False)
    await jobs.add(1, tenant=Tenant("other"), push=False)
    assert await feeder.turn() == timedelta(seconds=5)
    await jobs.add(20, push=False)
    assert await feeder.turn() == timedelta(seconds=1)


async def test_an_id_later_than_any_lease_is_pulled_to_its_rows_time_and_a_lease_is_not(
    pool: Pool, redis: Redis, dispatch: Dispatch, jobs: Jobs
) -> None:
    leased, late = sorted(await jobs.add(2, push=False))
    await dispatch.push([(Entry(QUEUE, leased), LEASE), (Entry(QUEUE, late), LEASE + MINUTE)])
    feeder = Feeder(pool, dispatch, listen_url=None, longest_lease=lambda: LEASE)
    await dispatch.redis.evaluate(
        script("return redis.call('SET', KEYS[1], ARGV[1])"), [keys.FED], [redis.run_id]
    )
    await feeder.turn()
    claim = await dispatch.claim(5, {LANE: 1}, LEASE, LEASE)
    assert [entry.id for entry in claim.entries] == [late]


async def test_a_wiped_dispatch_is_filled_without_waiting_for_the_feeders_own_look(
    pool: Pool, redis: Redis, jobs: Jobs, provider: SimulatedProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace_workers.feeder.INTERVAL", timedelta(minutes=10))
    async with running_worker():
        await jobs.ended(await jobs.add(1))
        ids = await jobs.add(40, delay=MINUTE, push=False)
        await flush(redis)
        await pool.execute("UPDATE headrace.jobs SET run_at = headrace.now() WHERE state = 'queued'")
        await jobs.ended(ids)
    assert provider.books.total.requests == 41
