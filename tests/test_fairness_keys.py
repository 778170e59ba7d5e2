"""Caps of API keys: no more of their jobs run at a time than may, and nobody else's waits for them."""

from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from itertools import product

import pytest

from headrace_shared.dispatch import keys
from headrace_shared.dispatch.connection import Redis
from headrace_shared.dispatch.dispatch import Dispatch, Entry, Gate, GateReason
from headrace_shared.ids import JobId, Lane, RouteName, Tenant, WorkerId, new_job_id
from headrace_shared.job import JobState, Queue
from headrace_shared.policy import NO_TERMS, Terms
from headrace_shared.store import claims, feed
from headrace_shared.store.pool import Pool
from headrace_shared.testing.behaviour import Behaviour
from headrace_shared.testing.clock import Clock, script
from headrace_shared.testing.jobs import LANE, MODEL, TENANT, Jobs, eventually
from headrace_shared.testing.scripted_provider import ScriptedProvider
from headrace_shared.testing.simulated_provider import SimulatedProvider
from headrace_shared.testing.spending import flush
from headrace_workers.feeder import Feeder
from headrace_workers.testing import running_worker

pytestmark = pytest.mark.conformance

INTERACTIVE = Lane("interactive")
LANES = {INTERACTIVE: 8, LANE: 4}
LEASE = timedelta(seconds=30)
NOW = timedelta(0)
AT_ONCE = timedelta(milliseconds=10)
A, B = Tenant("a"), Tenant("b")


def queue(key: str | None, *, tenant: Tenant = A, lane: Lane = LANE, route: str = MODEL) -> Queue:
    return Queue(lane, RouteName(route), tenant, key)


def caps(version: int = 1, *, tenants: Mapping[Tenant, int] | None = None, **most: int) -> Terms:
    return Terms(version, {}, tenants or {}, most)


async def push(dispatch: Dispatch, of: Queue, count: int = 1) -> list[Entry]:
    new = [Entry(of, new_job_id()) for _ in range(count)]
    await dispatch.push([(entry, NOW) for entry in new])
    return new


async def claim(dispatch: Dispatch, said: Terms, slots: int = 20) -> list[Entry]:
    return (await dispatch.claim(slots, LANES, LEASE, LEASE, terms=said)).entries


@pytest.fixture
async def dispatch(dispatch: Dispatch) -> Dispatch:
    """One that knows what runs: nothing."""
    await dispatch.begin_afresh()
    return dispatch


@pytest.fixture
def jobs(pool: Pool, dispatch: Dispatch) -> Jobs:
    return Jobs(pool, dispatch)


@pytest.mark.parametrize("name", ["ci", "a/b", "a%00b", "a:b", "ü", "%"])
def test_the_name_of_a_queue_says_its_key(name: str) -> None:
    for of in (queue(name), queue(None), queue(name, lane=Lane("x@y"), route="o/4|x:1/2")):
        assert keys.parse_queue_name(keys.queue_name(of)) == of


@pytest.mark.parametrize(
    "name",
    ["l:r:t\0k", "l:r:t%00", "l:r:t%00k%2f", "l:r:%00k", "l:r:%00", "l:r:t%00k:x", "l:r:t%00\0", "l:r:"],
)
async def test_what_is_no_name_of_a_queue_is_none(dispatch: Dispatch, name: str) -> None:
    assert keys.parse_queue_name(name) is None
    put = script("redis.call('ZADD', KEYS[1], 0, ARGV[2]) redis.call('ZADD', KEYS[2], 0, ARGV[1])")
    await dispatch.redis.evaluate(put, [keys.QUEUE + name, keys.WAITING], [name, str(new_job_id())])
    (mine,) = await push(dispatch, queue("ci", lane=Lane("l")))
    lanes = {Lane("l"): 1}
    found = await dispatch.claim(20, lanes, LEASE, LEASE, terms=caps(ci=1))
    assert (found.entries, found.foreign) == ([mine], 1)
    assert (await dispatch.claim(20, lanes, LEASE, LEASE)).foreign == 0


async def test_a_key_runs_no_more_at_a_time_than_it_may_whoevers_its_jobs_are(dispatch: Dispatch) -> None:
    said = caps(ci=3)
    for lane, route, tenant in product(LANES, (MODEL, "other"), (A, B)):
        await push(dispatch, queue("ci", lane=lane, route=route, tenant=tenant), 2)
    running: list[Entry] = []
    ended: list[Entry] = []
    for _ in range(16):
        running += await claim(dispatch, said, 2)
        running += await claim(dispatch, said, 2)
        assert len(running) == min(3, 16 - len(ended))
        one, *running = running
        await dispatch.finish([(one, None)])
        ended.append(one)
    assert len(set(ended)) == 16


async def test_a_full_key_keeps_nobody_else_waiting(dispatch: Dispatch) -> None:
    said = caps(ci=1, nightly=2)
    await push(dispatch, queue("ci"), 500)
    await push(dispatch, queue("ci", lane=INTERACTIVE), 500)
    running = Counter(entry.queue.key for entry in await claim(dispatch, said))
    assert running == {"ci": 1}
    others = [
        *await push(dispatch, queue(None), 2),
        *await push(dispatch, queue("nightly"), 2),
        *await push(dispatch, queue("free"), 2),
        *await push(dispatch, queue("free", tenant=B), 2),
    ]
    assert set(await claim(dispatch, said, 8)) == set(others)
    assert await claim(dispatch, said) == []


async def test_caps_of_a_tenant_and_of_its_keys_hold_together(dispatch: Dispatch) -> None:
    said = caps(tenants={A: 3}, ci=2)
    await push(dispatch, queue("ci"), 10)
    await push(dispatch, queue("ci", tenant=B), 10)
    await push(dispatch, queue(None), 10)
    running: list[Entry] = []
    done = Counter[tuple[str, str | None]]()
    while sum(done.values()) < 30:
        running += await claim(dispatch, said)
        assert running
        assert sum(entry.queue.key == "ci" for entry in running) <= 2
        assert sum(entry.queue.tenant == A for entry in running) <= 3
        one, *running = running
        await dispatch.finish([(one, None)])
        done[one.queue.tenant, one.queue.key] += 1
    assert set(done.values()) == {10}


async def test_a_job_that_ends_wakes_a_worker_for_the_lanes_of_its_key(dispatch: Dispatch) -> None:
    said = caps(ci=1)
    (running,) = await push(dispatch, queue("ci"))
    assert await claim(dispatch, said) == [running]
    other = await push(dispatch, queue("ci", lane=INTERACTIVE, tenant=B))
    assert await claim(dispatch, said) == []
    while await dispatch.wait_for_jobs(tuple(LANES), AT_ONCE):
        pass
    await dispatch.finish([(running, None)])
    assert await dispatch.wait_for_jobs([INTERACTIVE], AT_ONCE)
    assert await claim(dispatch, said) == other


async def test_a_job_that_is_put_back_gives_its_place_to_another(dispatch: Dispatch) -> None:
    said = caps(ci=1)
    waiting = await push(dispatch, queue("ci"), 2)
    (first,) = await claim(dispatch, said)
    await dispatch.finish([(first, timedelta(hours=1))])
    (second,) = await claim(dispatch, said)
    assert {first, second} == set(waiting)


async def test_a_lease_that_ends_gives_its_place_free_and_one_that_is_renewed_does_not(
    dispatch: Dispatch, clock: Clock
) -> None:
    said = caps(ci=2)
    await push(dispatch, queue("ci"), 4)
    kept, _ = await claim(dispatch, said)
    await clock.advance(LEASE / 2)
    await dispatch.renew([(kept, LEASE)])
    assert await claim(dispatch, said) == []
    await clock.advance(LEASE / 2)
    (another,) = await claim(dispatch, said)
    assert another != kept
    assert await claim(dispatch, said) == []


async def test_caps_change_at_once_for_what_runs_already(dispatch: Dispatch) -> None:
    await push(dispatch, queue("ci"), 9)
    assert len(await claim(dispatch, NO_TERMS, 2)) == 2
    assert await claim(dispatch, caps(1, ci=2)) == []
    assert len(await claim(dispatch, caps(2, ci=3))) == 1
    assert await claim(dispatch, caps(1, ci=9)) == []
    assert len(await claim(dispatch, caps(3))) == 6


async def test_a_gate_before_a_key_keeps_back_its_queues_alone(dispatch: Dispatch) -> None:
    kept = await push(dispatch, queue("ci"), 2)
    gate = Gate("key:ci", GateReason.PAUSE)
    await dispatch.close_gate(gate, None)
    others = [*await push(dispatch, queue(None)), *await push(dispatch, queue("nightly"))]
    assert set(await claim(dispatch, caps(ci=1))) == set(others)
    await dispatch.open_gate(gate)
    (one,) = await claim(dispatch, caps(ci=1))
    assert one in kept


async def test_a_key_costs_a_claim_and_an_end_the_same_for_one_job_and_for_many(dispatch: Dispatch) -> None:
    async def count(of: Queue, jobs: int) -> int:
        await push(dispatch, of, jobs)
        before = await commands_of(dispatch.redis)
        entries = await claim(dispatch, NO_TERMS, 30)
        assert len(entries) == jobs
        await dispatch.finish([(entry, None) for entry in entries])
        return await commands_of(dispatch.redis) - before

    more: list[int] = []
    for jobs in (2, 20):
        plain, of_key = queue(None, tenant=Tenant(f"p{jobs}")), queue("free", tenant=Tenant(f"k{jobs}"))
        more.append(await count(of_key, jobs) - await count(plain, jobs))
    assert 0 < more[0] == more[1] < 8


async def test_queues_of_full_keys_cost_a_claim_nothing(dispatch: Dispatch) -> None:
    full = [f"full-{number}" for number in range(300)]
    said = Terms(1, {}, {}, dict.fromkeys(full, 1))
    for key in full:
        await push(dispatch, queue(key), 2)
    while await claim(dispatch, said, 100):
        pass
    (mine,) = await push(dispatch, queue(None))
    before = await commands_of(dispatch.redis)
    assert await claim(dispatch, said) == [mine]
    assert await commands_of(dispatch.redis) - before < 100


async def commands_of(redis: Redis) -> int:
    stats = await redis.evaluate(script("return redis.call('INFO', 'commandstats')"))
    assert isinstance(stats, bytes)
    return sum(
        int(line.split("calls=")[1].split(",")[0]) for line in stats.decode().splitlines() if "=" in line
    )


# Both stores.


async def test_a_flood_of_a_full_key_fills_no_window_but_its_own(pool: Pool, redis: Redis) -> None:
    dispatch = Dispatch(redis, window=20)
    jobs = Jobs(pool, dispatch)
    await jobs.add(200, api_key="ci", push=False)
    (other,) = await jobs.add(push=False)
    (another,) = await jobs.add(api_key="nightly", push=False)
    await Feeder(pool, dispatch, listen_url=None, window=20).turn()
    found = await claim(dispatch, caps(ci=2))
    assert Counter(entry.queue.key for entry in found) == {"ci": 2, None: 1, "nightly": 1}
    assert {other, another} <= {entry.id for entry in found}


async def test_a_cap_holds_over_the_loss_of_everything_in_redis(
    pool: Pool, redis: Redis, dispatch: Dispatch, jobs: Jobs
) -> None:
    said = caps(ci=2)
    feeder = Feeder(pool, dispatch, listen_url=None)
    await jobs.add(6, api_key="ci")
    running = await claim(dispatch, said)
    await claims.claim_jobs(pool, [entry.id for entry in running], WorkerId("w"), LEASE)
    await flush(redis)
    await jobs.add(1, api_key="ci")
    assert await claim(dispatch, said) == [], "before anybody knows what runs"
    await feeder.turn()
    assert await claim(dispatch, said) == []
    await dispatch.finish([(running[0], None)])
    assert len(await claim(dispatch, said)) == 1


async def test_every_statement_that_names_a_queue_names_its_key(pool: Pool, jobs: Jobs) -> None:
    (job_id,) = await jobs.add(api_key="ci", push=False)
    of = Queue(LANE, RouteName(MODEL), TENANT, "ci")
    assert await feed.due_queues(pool) == [of]
    assert await feed.due_jobs(pool, [of, queue(None, tenant=TENANT)], limit=9) == [[job_id], []]
    (job,) = (await claims.claim_jobs(pool, [job_id], WorkerId("w"), LEASE)).jobs
    assert job.queue == of
    assert [entry for entry, _ in await feed.running_jobs(pool)] == [Entry(of, job_id)]
    (found,) = await claims.look_up(pool, [job_id])
    assert found.queue == of


async def test_claims_from_the_store_keep_caps_of_keys_and_of_tenants(pool: Pool, jobs: Jobs) -> None:
    for route in ("x", "y"):
        await jobs.add(10, model=route, tenant=A, api_key="ci", push=False)
    await jobs.add(10, tenant=B, api_key="ci", push=False)
    await jobs.add(10, tenant=A, push=False)
    await jobs.add(2, tenant=B, api_key="free", push=False)
    (running,) = await jobs.add(1, tenant=B, api_key="ci", push=False)
    await claims.claim_jobs(pool, [running], WorkerId("w"), LEASE)
    said = caps(tenants={A: 7}, ci=4)
    picked = await claims.pick_due(pool, {LANE: 1}, 30, abilities=claims.PLAIN, terms=said)
    found = Counter([await owner_of(jobs, one.id) for one in picked])
    assert sum(count for (_, key), count in found.items() if key == "ci") == 3
    assert sum(count for (tenant, _), count in found.items() if tenant == A) == 7
    assert found[B, "free"] == 2


async def owner_of(jobs: Jobs, job_id: JobId) -> tuple[str, str | None]:
    job = (await jobs.ending(job_id)).job
    return job.tenant, job.api_key


@pytest.mark.usefixtures("environment")
async def test_two_workers_keep_the_cap_of_a_key_together(jobs: Jobs, provider: SimulatedProvider) -> None:
    await jobs.configure({"keys": {"ci": {"concurrent": 2}}})
    provider.behave(Behaviour(latency=timedelta(milliseconds=30)))
    ids = [
        *await jobs.add(12, api_key="ci"),
        *await jobs.add(12, api_key="ci", tenant=B, lane=INTERACTIVE),
    ]
    async with running_worker(concurrency=8), running_worker(concurrency=8):
        await jobs.ended(ids)
    assert provider.books.total.requests == len(ids)
    assert provider.books.max_concurrent == 2


@pytest.mark.usefixtures("environment")
async def test_a_dead_workers_place_under_a_key_is_taken_again(
    pool: Pool, jobs: Jobs, dispatch: Dispatch, clock: Clock, scripted: ScriptedProvider
) -> None:
    await jobs.configure({"keys": {"ci": {"concurrent": 1}}})
    ids = await jobs.add(2, api_key="ci")
    (lost,) = await claim(dispatch, caps(ci=1))
    await claims.claim_jobs(pool, [lost.id], WorkerId("dead"), LEASE)
    async with running_worker():
        await jobs.ended(await jobs.add(1))
        states = {(await jobs.row(job_id))["state"] for job_id in ids}
        assert states == {JobState.RUNNING, JobState.QUEUED}
        await clock.advance(LEASE + timedelta(seconds=1))
        endings = await jobs.ended(ids)
    assert {ending.job.state for ending in endings} == {JobState.SUCCEEDED}


# Beside a worker of the version before: to it a key is part of the tenant's name, and it puts jobs of keys
# into the queues of their tenants.


async def test_a_queue_that_the_version_before_keeps_elsewhere_is_moved(dispatch: Dispatch) -> None:
    (mine,) = await push(dispatch, queue("ci"))
    name = keys.queue_name(mine.queue)
    moved = script(
        "redis.call('DEL', KEYS[1], KEYS[2])"
        " redis.call('ZADD', KEYS[3], 0, ARGV[1]) redis.call('ZADD', KEYS[2], 0, ARGV[2])"
    )
    places = [f"{keys.ACTIVE}{LANE}:a", keys.TURN + LANE, f"{keys.ACTIVE}{LANE}:a%00ci"]
    await dispatch.redis.evaluate(moved, places, [name, "a%00ci"])
    found = await dispatch.claim(5, LANES, LEASE, LEASE, terms=caps(ci=1))
    assert (found.entries, found.foreign) == ([mine], 0)


@pytest.mark.usefixtures("environment")
async def test_an_id_in_a_queue_without_its_key_is_run_once_and_forgotten(
    jobs: Jobs, dispatch: Dispatch, clock: Clock, provider: SimulatedProvider
) -> None:
    (job_id,) = await jobs.add(api_key="ci", push=False)
    plain = Queue(LANE, RouteName(MODEL), TENANT)
    await dispatch.push([(Entry(plain, job_id), NOW)])
    async with running_worker():
        await jobs.ended([job_id])
        await clock.advance(timedelta(minutes=1))
        await eventually(lambda: left_in(dispatch, plain), lambda count: count == 0)
    assert provider.books.total.requests == 1


async def left_in(dispatch: Dispatch, of: Queue) -> int:
    count = await dispatch.redis.evaluate(
        script("return redis.call('ZCARD', KEYS[1])"), [keys.QUEUE + keys.queue_name(of)]
    )
    assert isinstance(count, int)
    return count
