"""One of the two servers is away: nothing is lost, nothing is over budget, and nobody runs hot."""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace_producer import Headrace
from headrace_shared.budgets import HOLD_LEASE, Budgets, Settlement
from headrace_shared.configuration import Configuration
from headrace_shared.dispatch.connection import Redis
from headrace_shared.dispatch.dispatch import Dispatch
from headrace_shared.embedded import embedded_servers
from headrace_shared.errors import DispatchUnavailable, StoreUnavailable
from headrace_shared.ids import HoldId, JobId, Lane, Tenant, WorkerId
from headrace_shared.job import JobState
from headrace_shared.money import NanoUSD
from headrace_shared.outcome import ErrorClass, Failure
from headrace_shared.routes import Target
from headrace_shared.store import claims, feed, migrate, money
from headrace_shared.store.configurations import Versioned
from headrace_shared.store.money import BudgetPolicy, Refused, WindowKind
from headrace_shared.store.pool import Pool, connect, open_pool
from headrace_shared.testing.behaviour import Behaviour
from headrace_shared.testing.clock import Clock, script
from headrace_shared.testing.jobs import LANE, Jobs, eventually
from headrace_shared.testing.server_faults import OwnServers, out_of_memory, postgres_down, valkey_down
from headrace_shared.testing.simulated_provider import SimulatedProvider
from headrace_shared.testing.spending import Call, Spender, counted
from headrace_shared.usage import NO_USAGE, Finish
from headrace_workers.breaker import Breakers, NotNow, Permit
from headrace_workers.configured import Configured
from headrace_workers.reach import Reach
from headrace_workers.replies import Answered, Reply
from headrace_workers.replies import Refused as RefusedCall
from headrace_workers.store_claims import StoreClaims
from headrace_workers.testing import running_worker

NOWHERE = "redis://127.0.0.1:1"
ME, OTHER = WorkerId("me"), WorkerId("other")
SLOTS = 4
LONG = timedelta(hours=1)
OK = Answered(timedelta(seconds=1), 200, None, b"{}", NO_USAGE, Finish.COMPLETE)
BAD = RefusedCall(timedelta(seconds=1), Failure(ErrorClass.TRANSIENT, "503"), 503)


# Who declares the epoch without Redis, and who ends it.


@asynccontextmanager
async def cut_off() -> AsyncGenerator[Redis]:
    """A way to Redis on which nobody answers."""
    redis = Redis(NOWHERE)
    try:
        yield redis
    finally:
        await redis.close()


@asynccontextmanager
async def reach(
    pool: Pool, redis: Redis, worker: WorkerId, *, clock: Clock | None = None
) -> AsyncGenerator[Reach]:
    """A live worker's, whose patience is over at once."""
    await feed.register_worker(pool, worker, host="here", slots=1, lanes=(LANE,), alive=LONG)

    def seconds() -> float:
        return clock.shift.total_seconds() if clock else 0.0

    yield Reach(pool, redis, Budgets(pool, redis), worker, patience=timedelta(0), clock=seconds)


async def degraded(pool: Pool) -> bool:
    return (await money.epoch_in_force(pool)).degraded


async def test_the_fleet_does_without_redis_only_when_no_live_worker_reaches_it(
    pool: Pool, redis: Redis, clock: Clock
) -> None:
    async with (
        cut_off() as away,
        reach(pool, away, ME) as mine,
        reach(pool, redis, OTHER, clock=clock) as others,
    ):
        await others.look()
        await mine.look()
        assert (mine.without_redis, await degraded(pool)) == (False, False)
        # The other is believed for a while only; and a dead one is not asked.
        await clock.advance(timedelta(seconds=16))
        await mine.look()
        assert (mine.without_redis, await degraded(pool)) == (True, True)
        await others.look()
        assert not await degraded(pool)
        await mine.look()
        assert (mine.without_redis, await degraded(pool)) == (False, False)


async def test_a_worker_of_the_version_before_is_taken_to_reach_redis(pool: Pool) -> None:
    async with cut_off() as away, reach(pool, away, ME) as mine:
        await feed.register_worker(pool, OTHER, host="here", slots=1, lanes=(LANE,), alive=LONG)
        await mine.look()
        assert not mine.without_redis
        await feed.forget_worker(pool, OTHER)
        await mine.look()
        assert mine.without_redis


async def test_a_process_that_runs_one_job_does_not_keep_the_fleet_from_doing_without_redis(
    pool: Pool,
) -> None:
    async with cut_off() as away, reach(pool, away, ME) as mine:
        # As its heartbeat does, again and again.
        for _ in range(2):
            await feed.register_worker(pool, OTHER, host="here", slots=1, lanes=(), alive=LONG)
        await mine.look()
        assert mine.without_redis


async def test_a_full_redis_counts_as_away(
    pool: Pool, redis: Redis, redis_url: str, spender: Spender
) -> None:
    budgets = Budgets(pool, redis)
    await spender.open(budgets, 1, "global")
    async with reach(pool, redis, ME) as mine:
        await mine.look()
        async with out_of_memory(redis_url):
            await mine.look()
            assert mine.without_redis
            epoch = await money.current_epoch(pool)
            with pytest.raises(DispatchUnavailable):
                await budgets.check_epoch()
            await spender.open(budgets, 1, "global")
            assert await money.current_epoch(pool) == epoch
        await mine.look()
        assert not await degraded(pool)


# Money without Redis.


@pytest.fixture
async def spender(pool: Pool) -> Spender:
    return await Spender.start(pool)


@pytest.fixture
async def alone(pool: Pool) -> AsyncIterator[Budgets]:
    """The budgets of a process in a fleet without Redis."""
    await money.degrade(pool, ME)
    async with cut_off() as away:
        yield Budgets(pool, away)


async def limit(pool: Pool, scope: str, amount: int, kind: WindowKind = WindowKind.TOTAL) -> None:
    await money.set_budget(pool, scope, kind, NanoUSD(amount), BudgetPolicy.WAIT)


async def test_nothing_is_held_without_redis_until_the_epoch_says_so(pool: Pool, spender: Spender) -> None:
    async with cut_off() as away:
        with pytest.raises(DispatchUnavailable):
            await spender.hold(Budgets(pool, away), 1, "global")


async def test_holds_in_the_store_are_refused_as_those_in_redis_are(
    pool: Pool, redis: Redis, spender: Spender
) -> None:
    for scope, amount in (("global", 100), ("tenant:a", 60)):
        await limit(pool, scope, amount)
    await limit(pool, "tenant:b", 50, WindowKind.DAY)
    for scope, policy in (("model:m|n", BudgetPolicy.DOWNGRADE), ("tag:soft", BudgetPolicy.SOFT)):
        await money.set_budget(pool, scope, WindowKind.WEEK, NanoUSD(30), policy)
    answers: dict[bool, list[object]] = {}
    for without_redis in (False, True):
        async with cut_off() as away:
            budgets = Budgets(pool, away if without_redis else redis)
            if without_redis:
                await money.degrade(pool, ME)
            assert isinstance(await spender.try_hold(budgets, 40, "global", "tenant:a"), Call)
            refused = [
                await spender.try_hold(budgets, amount, "global", *scopes)
                for amount, scopes in (
                    (21, ["tenant:a"]),
                    (61, []),
                    (51, ["tenant:b"]),
                    (31, ["key:none", "model:m|n", "tag:soft"]),
                )
            ]
            assert isinstance(await spender.try_hold(budgets, 20, "tenant:a", "global"), Call)
            assert isinstance(await spender.try_hold(budgets, 31, "tag:soft"), Call)
            answers[without_redis] = [
                (
                    one.scope,
                    one.kind,
                    one.limit,
                    one.missing,
                    one.held_by_others,
                    one.policy,
                    one.ends_in is None,
                )
                for one in refused
                if isinstance(one, Refused)
            ]
    assert len(answers[True]) == 4
    assert answers[True] == answers[False]


async def test_an_intent_takes_the_place_of_its_hold(pool: Pool, alone: Budgets, spender: Spender) -> None:
    await limit(pool, "global", 100)
    call = await spender.open(alone, 60, "global")
    assert (await spender.refused(alone, 41, "global")).held_by_others == 60
    settlement = await spender.conclude(call, cost=10)
    await alone.settle([settlement])
    await spender.hold(alone, 90, "global")
    assert (await spender.refused(alone, 1, "global")).missing == 1


async def test_a_hold_without_an_intent_is_given_back(
    pool: Pool, alone: Budgets, spender: Spender, clock: Clock
) -> None:
    await limit(pool, "global", 100)
    call = await spender.hold(alone, 100, "global")
    await alone.settle([Settlement(call.held.id, NanoUSD(0))])
    leaked = await spender.hold(alone, 100, "global")
    await spender.refused(alone, 1, "global")
    await clock.advance(HOLD_LEASE + timedelta(seconds=1))
    assert await alone.expired_holds() == []
    await spender.hold(alone, 100, "global")
    assert not await spender.intend(leaked)


async def test_a_hold_of_one_epoch_pays_for_nothing_in_another(
    pool: Pool, redis: Redis, budgets: Budgets, spender: Spender
) -> None:
    await budgets.set("global", WindowKind.TOTAL, NanoUSD(100), BudgetPolicy.WAIT)
    before = await spender.hold(budgets, 60, "global")
    opened = await spender.open(budgets, 30, "global")
    async with cut_off() as away:
        alone = Budgets(pool, away)
        await money.degrade(pool, ME)
        assert not await spender.intend(before)
        assert (await spender.refused(alone, 71, "global")).held_by_others == 30
        without = await spender.open(alone, 10, "global")
        late = await spender.hold(alone, 60, "global")
        # Redis is back.
        await budgets.resume()
        assert not await spender.intend(late)
    assert await counted(redis, "global") == (0, 0, 40)
    assert (await spender.refused(budgets, 61, "global")).held_by_others == 40
    for call in (opened, without):
        await budgets.settle([await spender.conclude(call, cost=5)])
    assert await counted(redis, "global") == (10, 0, 0)


async def test_budgets_are_set_and_shown_without_redis(pool: Pool, alone: Budgets, spender: Spender) -> None:
    await alone.set("global", WindowKind.TOTAL, NanoUSD(100), BudgetPolicy.WAIT)
    await spender.open(alone, 60, "global")
    await spender.hold(alone, 30, "global")
    (view,) = await alone.view()
    assert (view.held, view.remaining) == (90, 10)


@asynccontextmanager
async def black_hole() -> AsyncGenerator[tuple[Redis, list[bytes]]]:
    """A way to Redis on which everything is accepted and nothing is answered; and what was asked."""
    asked: list[bytes] = []
    writers: list[asyncio.StreamWriter] = []

    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        while data := await reader.read(4096):
            asked.append(data)

    server = await asyncio.start_server(swallow, "127.0.0.1", 0)
    redis = Redis(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    try:
        yield redis, asked
    finally:
        server.close()
        for writer in writers:
            writer.close()
        await redis.close()


async def test_a_redis_that_hangs_is_not_asked_for_money_while_the_fleet_does_without_it(
    pool: Pool, spender: Spender
) -> None:
    await limit(pool, "global", 100)
    await money.degrade(pool, ME)
    async with black_hole() as (hanging, asked):
        budgets = Budgets(pool, hanging)
        await budgets.is_without_redis()
        call = await spender.open(budgets, 60, "global")
        await budgets.settle([await spender.conclude(call, cost=10)])
        await spender.hold(budgets, 90, "global")
        await budgets.check_epoch()
        await budgets.rebuild()
        assert await budgets.expired_holds() == []
        (view,) = await budgets.view()
        assert (view.held, asked) == (90, [])


async def test_a_worker_that_finds_the_fleet_without_redis_tells_its_budgets(pool: Pool) -> None:
    async with black_hole() as (hanging, asked), cut_off() as away:
        await feed.register_worker(pool, ME, host="here", slots=1, lanes=(LANE,), alive=LONG)
        budgets = Budgets(pool, hanging)
        mine = Reach(pool, away, budgets, ME, patience=timedelta(0))
        await mine.look()
        assert mine.without_redis
        await budgets.rebuild()
        assert asked == []


async def test_money_is_held_and_settled_in_redis_again_once_the_epoch_without_it_has_ended(
    pool: Pool, redis: Redis, budgets: Budgets, spender: Spender
) -> None:
    await budgets.set("global", WindowKind.TOTAL, NanoUSD(100), BudgetPolicy.WAIT)
    await money.degrade(pool, ME)
    await budgets.is_without_redis()
    call = await spender.open(budgets, 60, "global")
    settlement = await spender.conclude(call, cost=10)
    late = await spender.open(budgets, 20, "global")
    await budgets.settle([settlement])
    # Another process ends it: this one learns of that from the store, not from Redis.
    await Budgets(pool, redis).resume()
    assert await counted(redis, "global") == (10, 0, 20)
    await budgets.settle([await spender.conclude(late, cost=5)])
    assert await counted(redis, "global") == (15, 0, 0)
    await spender.open(budgets, 30, "global")
    assert await counted(redis, "global") == (15, 0, 30)


AMOUNTS = st.lists(st.tuples(st.integers(1, 60), st.sampled_from(["a", "b"])), min_size=4, max_size=16)


@settings(
    max_examples=25,
    derandomize=True,
)
@given(amounts=AMOUNTS)
async def test_processes_that_hold_at_once_are_never_over_and_never_refused_in_vain(
    pool: Pool, amounts: list[tuple[int, str]]
) -> None:
    await pool.execute("TRUNCATE headrace.calls, headrace.spend, headrace.budgets, headrace.holds")
    limits = {"global": 100, "tenant:a": 60, "tenant:b": 70}
    for scope, amount in limits.items():
        await limit(pool, scope, amount)
    await money.degrade(pool, ME)
    spender = await Spender.start(pool)
    async with cut_off() as one, cut_off() as other:
        processes = [Budgets(pool, one), Budgets(pool, other)]

        async def spend(number: int, amount: int, tenant: str) -> Call | Refused:
            scopes = ("global", f"tenant:{tenant}") if number % 3 else (f"tenant:{tenant}", "global")
            call = await spender.try_hold(processes[number % 2], amount, *scopes)
            if isinstance(call, Call):
                assert await spender.intend(call)
            return call

        answers = await asyncio.gather(*(spend(number, *one) for number, one in enumerate(amounts)))
        used: Counter[str] = Counter()
        for answer in answers:
            if isinstance(answer, Call):
                used.update(dict.fromkeys(answer.scopes, answer.held.amount))
        assert all(used[scope] <= limits[scope] for scope in limits)
        # What is refused now would have been over.
        for amount, tenant in amounts:
            fits = all(used[scope] + amount <= limits[scope] for scope in ("global", f"tenant:{tenant}"))
            again = await spender.try_hold(processes[0], amount, "global", f"tenant:{tenant}")
            assert isinstance(again, Call) == fits
            if isinstance(again, Call):
                await processes[1].settle([Settlement(again.held.id, NanoUSD(0))])


# Claims from the store.


async def test_jobs_are_picked_in_turn_and_by_the_weights_of_their_lanes(
    pool: Pool, dispatch: Dispatch
) -> None:
    jobs = Jobs(pool, dispatch)
    other = Lane("batch")
    deep = await jobs.add(30, push=False)
    small = await jobs.add(3, tenant=Tenant("small"), push=False)
    await jobs.add(30, lane=other, push=False)
    await jobs.add(1, lane=Lane("unserved"), push=False)
    picked = await claims.pick_due(pool, {LANE: 3, other: 1}, 12, abilities=claims.PLAIN)
    assert Counter(one.lane for one in picked) == {LANE: 9, other: 3}
    ids = {one.id for one in picked}
    assert ids >= set(small)
    assert len(ids & set(deep)) == 6
    assert ids >= set(sorted(deep)[:6])


async def test_jobs_of_handlers_are_claimed_from_the_store_by_who_has_them(
    pool: Pool, dispatch: Dispatch
) -> None:
    lane = Lane("default@sum")
    (job_id,) = await Jobs(pool, dispatch).add(lane=lane, push=False)
    await pool.execute("UPDATE headrace.jobs SET endpoint = 'handler:sum'")
    has_it = claims.Abilities(endpoints=("handler:sum",))
    found: list[list[JobId]] = []
    for abilities in (claims.PLAIN, has_it):
        taken = await StoreClaims(pool, WorkerId("a"), abilities).claim(
            5, {lane: 1}, lambda _: timedelta(minutes=1), take_suspect=lambda _: False
        )
        found.append([job.id for job in taken.jobs])
    assert found == [[], [job_id]]


async def test_suspects_that_find_no_process_keep_no_other_job_waiting(
    pool: Pool, dispatch: Dispatch
) -> None:
    jobs = Jobs(pool, dispatch)
    await jobs.add(10, push=False)
    await pool.execute("UPDATE headrace.jobs SET crashes = 2")
    others = await jobs.add(5, push=False)
    taken: set[JobId] = set()

    def take(job_id: JobId) -> bool:
        if len(taken) == 2 or job_id in taken:
            return False
        taken.add(job_id)
        return True

    store = StoreClaims(pool, ME, claims.PLAIN)
    found = await store.claim(6, {LANE: 1}, lambda _: LONG, take_suspect=take)
    assert (len(taken), len(found.jobs)) == (2, 4)
    rest = await store.claim(6, {LANE: 1}, lambda _: LONG, take_suspect=take)
    assert {job.id for job in found.jobs + rest.jobs} == set(others)


# Breakers without Redis.


async def test_a_breaker_without_redis_opens_probes_and_closes_by_itself(pool: Pool) -> None:
    document = {"breaker": {"minimum_calls": 4, "cooldown": "10ms", "probe_lease": "30s"}}
    configured = Configured(pool, Versioned(0, Configuration.from_document(document)))
    async with cut_off() as away:
        breaker = Breakers(Dispatch(away), configured).of(Target("openai", "gpt-4o"))

        def state() -> str:
            return breaker.state

        async def call(reply: Reply) -> Permit | NotNow:
            async def send() -> Reply:
                return reply

            permit = await breaker.admit(HoldId("job:1:1"))
            if isinstance(permit, Permit):
                await breaker.call(permit, send)
            return permit

        for _ in range(4):
            assert state() == "closed"
            await call(BAD)
            with contextlib.suppress(DispatchUnavailable):
                await breaker.share()
        assert state() == "open"
        # After its pause one call is let out; its failure, and not another call, is what counts.
        probe = await eventually(lambda: call(BAD), lambda found: isinstance(found, Permit))
        assert probe == Permit("job:1:1")
        assert state() == "open"
        await eventually(lambda: call(OK), lambda found: isinstance(found, Permit))
        assert state() == "closed"
        assert await call(OK) == Permit()


# Whole outages, on servers of the test's own.


@pytest_asyncio.fixture
async def own(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[OwnServers]:
    """Servers that a test may stop, as a process finds them."""
    with TemporaryDirectory(prefix="headrace-test-") as name:
        async with embedded_servers(Path(name)) as servers:
            connection = await connect(servers.postgres_url)
            await migrate.migrate(connection)
            await connection.close()
            monkeypatch.setenv("HEADRACE_POSTGRES_URL", servers.postgres_url)
            monkeypatch.setenv("HEADRACE_REDIS_URL", servers.redis_url)
            yield OwnServers.of(Path(name))


@pytest_asyncio.fixture
async def jobs(own: OwnServers) -> AsyncIterator[Jobs]:
    pool, redis = await open_pool(own.postgres.url), Redis(own.valkey.url)
    yield Jobs(pool, Dispatch(redis))
    await pool.close()
    await redis.close()


def said(caplog: pytest.LogCaptureFixture) -> Counter[tuple[str, str]]:
    """How often each thing was said that is not merely told."""
    return Counter((one.name, one.msg) for one in caplog.records if one.levelno >= logging.WARNING)


async def each_once(jobs: Jobs, provider: SimulatedProvider, ids: list[JobId]) -> None:
    endings = await jobs.ended(ids)
    assert {ending.job.state for ending in endings} == {JobState.SUCCEEDED}
    states = await jobs.pool.fetch("SELECT state FROM headrace.calls")
    assert Counter(row["state"] for row in states) == {"answered": len(ids)}
    assert provider.books.total.requests == len(ids)
    assert await jobs.spend() == await jobs.ledger()


async def test_without_redis_jobs_are_accepted_and_end_and_the_money_is_right_when_it_is_back(
    own: OwnServers, jobs: Jobs, provider: SimulatedProvider, caplog: pytest.LogCaptureFixture
) -> None:
    redis = jobs.dispatch.redis
    budgets = Budgets(jobs.pool, redis)
    await budgets.set("global", WindowKind.TOTAL, NanoUSD(10**9), BudgetPolicy.WAIT)
    provider.behave(Behaviour(latency=timedelta(milliseconds=50)))
    async with Headrace() as client, running_worker(concurrency=SLOTS) as worker:
        ids = await jobs.add(2 * SLOTS)
        await jobs.ended(ids[:1])
        async with valkey_down(own):
            with caplog.at_level(logging.WARNING):
                for number in range(SLOTS):
                    body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": str(number)}]}
                    ids.append((await client.enqueue("/v1/chat/completions", body)).id)
                await each_once(jobs, provider, ids)
            assert await degraded(jobs.pool)
            assert await jobs.pool.fetchval("SELECT count(*) FROM headrace.holds") == 0
        await eventually(lambda: degraded(jobs.pool), lambda found: not found)
        ids += await jobs.add(SLOTS)
        await each_once(jobs, provider, ids)
        assert not worker.draining
    settled = (await jobs.spend())["global", "total"][0]
    await budgets.rebuild()
    assert await counted(redis, "global") == (settled, 0, 0)
    assert max(said(caplog).values()) <= 2


async def test_a_worker_starts_without_redis_where_the_fleet_runs_without_it(
    own: OwnServers, jobs: Jobs, provider: SimulatedProvider
) -> None:
    async with valkey_down(own):
        with pytest.raises(DispatchUnavailable):
            async with running_worker():
                pass  # Nobody has ever reached a Redis here: its address may be wrong.
    await Budgets(jobs.pool, jobs.dispatch.redis).rebuild()
    async with valkey_down(own):
        ids = await jobs.add(SLOTS, push=False)
        async with running_worker(concurrency=SLOTS):
            await each_once(jobs, provider, ids)


async def test_without_postgres_nothing_is_acked_or_begun_and_paid_answers_are_kept(
    own: OwnServers, jobs: Jobs, provider: SimulatedProvider, caplog: pytest.LogCaptureFixture
) -> None:
    provider.behave(Behaviour(latency=timedelta(seconds=2)))
    body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello"}]}
    async with Headrace() as client, running_worker(concurrency=SLOTS, lease_seconds=30) as worker:
        ids = await jobs.add(2 * SLOTS)
        await provider.books.until(lambda: provider.books.in_flight == SLOTS)
        with caplog.at_level(logging.WARNING):
            async with postgres_down(own):
                await provider.books.until(lambda: provider.books.total.requests == SLOTS)
                with pytest.raises(StoreUnavailable):
                    await client.enqueue("/v1/chat/completions", body)
                assert (provider.books.in_flight, len(worker.running)) == (0, SLOTS)
            await each_once(jobs, provider, ids)
        assert not worker.draining
    endings = [await jobs.ending(job_id) for job_id in ids]
    assert {(ending.job.attempts, ending.job.crashes) for ending in endings} == {(0, 0)}
    assert max(said(caplog).values()) <= 3
    assert "asyncio" not in {name for name, _ in said(caplog)}


async def test_a_server_that_is_away_is_asked_by_one_command_at_a_time() -> None:
    connections = 0

    async def hang_up(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    redis = Redis(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    async with server:
        for _ in range(500):
            with pytest.raises(DispatchUnavailable):
                await redis.evaluate(script("return 1"))
    await redis.close()
    assert 1 <= connections <= 10
