"""Pauses: what an operator keeps back waits, whatever becomes of Redis, and goes on when it is told to."""

from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
from command_line import Command

from headrace_shared.dispatch import keys
from headrace_shared.dispatch.connection import Redis
from headrace_shared.dispatch.dispatch import Dispatch, Gate, GateReason
from headrace_shared.ids import JobId, Lane, Tenant, WorkerId
from headrace_shared.job import JobState
from headrace_shared.pauses import Pauses
from headrace_shared.store import claims, feed, pauses
from headrace_shared.store.claims import Standing
from headrace_shared.store.pool import Pool
from headrace_shared.testing.clock import Clock
from headrace_shared.testing.jobs import LANE, MODEL, TENANT, Jobs, eventually
from headrace_shared.testing.scripted_provider import ScriptedProvider
from headrace_shared.testing.simulated_provider import SimulatedProvider
from headrace_shared.testing.spending import flush
from headrace_workers.feeder import Feeder
from headrace_workers.testing import running_worker

pytestmark = pytest.mark.usefixtures("environment")

ME = WorkerId("me")
MINUTE = timedelta(minutes=1)
HANDLERS = Lane("default@sum")
LANES = {LANE: 1, HANDLERS: 1, Lane("batch"): 1}
MINE = [f"tenant:{TENANT}", f"model:{MODEL}", f"lane:{LANE}", "global"]


@pytest.fixture
def jobs(pool: Pool, dispatch: Dispatch) -> Jobs:
    return Jobs(pool, dispatch)


@pytest.fixture
def hand(pool: Pool, dispatch: Dispatch) -> Pauses:
    return Pauses(pool, dispatch)


@pytest.fixture
async def nowhere() -> AsyncIterator[Dispatch]:
    """A Redis that does not answer."""
    away = Redis("redis://127.0.0.1:1")
    yield Dispatch(away)
    await away.close()


async def ids_in_redis(dispatch: Dispatch) -> set[JobId]:
    return {entry.id for entry in (await dispatch.claim(100, LANES, MINUTE, MINUTE)).entries}


async def claimed(pool: Pool, ids: list[JobId]) -> set[JobId]:
    return {job.id for job in (await claims.claim_jobs(pool, ids, ME, MINUTE)).jobs}


async def picked(pool: Pool) -> set[JobId]:
    return {one.id for one in await claims.pick_due(pool, LANES, 100, abilities=claims.PLAIN)}


@pytest.mark.parametrize("scope", MINE)
async def test_what_is_paused_is_claimed_from_neither_store_and_goes_on_where_it_was(
    pool: Pool, dispatch: Dispatch, jobs: Jobs, hand: Pauses, scope: str
) -> None:
    kept = await jobs.add(3)
    await hand.pause(scope)
    others = await jobs.add(2, tenant=Tenant("other"), model="gpt-4o", lane=Lane("batch"))
    free: set[JobId] = set() if scope == "global" else set(others)
    assert await ids_in_redis(dispatch) == free
    assert await picked(pool) == free
    assert await claimed(pool, kept) == set()
    assert {one.standing for one in await claims.look_up(pool, kept)} == {Standing.PAUSED}
    assert await hand.resume(scope)
    assert await ids_in_redis(dispatch) == {*kept, *others} - free
    assert await claimed(pool, kept) == set(kept)


async def test_a_paused_lane_keeps_the_jobs_of_its_handlers_back(
    pool: Pool, dispatch: Dispatch, jobs: Jobs, hand: Pauses
) -> None:
    kept = await jobs.add(2, lane=HANDLERS)
    await hand.pause(f"lane:{LANE}")
    assert await ids_in_redis(dispatch) == set()
    assert await picked(pool) == set()
    assert await claimed(pool, kept) == set()
    await hand.resume(f"lane:{LANE}")
    assert await ids_in_redis(dispatch) == set(kept)


async def test_a_pause_holds_from_its_commit_on_although_redis_was_never_told(
    pool: Pool, dispatch: Dispatch, nowhere: Dispatch, jobs: Jobs
) -> None:
    kept = await jobs.add(2)
    await Pauses(pool, nowhere).pause("global")
    assert await ids_in_redis(dispatch) == set(kept)
    assert await claimed(pool, kept) == set()


async def test_a_pause_with_a_duration_ends_by_itself_in_both_stores(
    pool: Pool, dispatch: Dispatch, jobs: Jobs, hand: Pauses, clock: Clock
) -> None:
    kept = await jobs.add(2)
    await hand.pause("global", MINUTE)
    assert (await ids_in_redis(dispatch), await picked(pool)) == (set(), set())
    await clock.advance(MINUTE)
    assert (await ids_in_redis(dispatch), await picked(pool)) == (set(kept), set(kept))
    assert await pauses.in_force(pool) == []
    assert not await hand.resume("global")


async def test_a_pause_that_is_said_again_lasts_as_is_said_last_and_began_as_is_said_first(
    pool: Pool, hand: Pauses, clock: Clock
) -> None:
    first = await hand.pause("global", MINUTE)
    second = await hand.pause("global", None)
    assert (second.since, second.until, second.left) == (first.since, None, None)
    third = await hand.pause("global", MINUTE)
    assert third.left == MINUTE
    await clock.advance(MINUTE)
    assert (await hand.pause("global")).since >= first.since + MINUTE


async def test_the_feeder_puts_pauses_back_into_a_wiped_redis_before_it_fills_it(
    pool: Pool, redis: Redis, dispatch: Dispatch, jobs: Jobs, hand: Pauses
) -> None:
    await jobs.add(3)
    others = await jobs.add(2, lane=Lane("batch"))
    await hand.pause(f"lane:{LANE}")
    await hand.pause("tenant:someone", MINUTE)
    await flush(redis)
    feeder = Feeder(pool, dispatch, listen_url=None)
    await feeder.turn()
    assert await dispatch.gates() == [f"lane:{LANE}|pause", "tenant:someone|pause"]
    left = {gate.dimension: gate.opens_in for gate in await dispatch.closed_gates()}
    assert left[f"lane:{LANE}"] is None
    assert (left["tenant:someone"] or timedelta()) > MINUTE - timedelta(seconds=30)
    assert await ids_in_redis(dispatch) == set(others)


async def test_the_feeder_mends_gates_that_say_something_else_than_the_rows(
    pool: Pool, dispatch: Dispatch, jobs: Jobs, hand: Pauses
) -> None:
    kept = await jobs.add(1)
    left_behind = [Gate("global", GateReason.PAUSE), Gate(f"tenant:{TENANT}", GateReason.PAUSE)]
    for gate in left_behind:
        await dispatch.close_gate(gate, None)
    assert await ids_in_redis(dispatch) == set()
    budget = Gate("tenant:other", GateReason.BUDGET)
    await dispatch.close_gate(budget, MINUTE)
    await pauses.pause(pool, "lane:batch", MINUTE)
    await dispatch.close_gate(Gate("lane:batch", GateReason.PAUSE), None)
    await hand.put_in_place()
    found = {str(Gate(gate.dimension, gate.reason)): gate.opens_in for gate in await dispatch.closed_gates()}
    assert found.keys() == {"lane:batch|pause", str(budget)}
    assert found["lane:batch|pause"] is not None
    assert await ids_in_redis(dispatch) == set(kept)


async def test_a_worker_leaves_paused_jobs_alone_and_is_woken_when_they_go_on(
    jobs: Jobs, hand: Pauses, provider: SimulatedProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It does not look by itself in the time that this test has.
    monkeypatch.setattr("headrace_workers.claiming.POLL", timedelta(minutes=5))
    async with running_worker():
        await hand.pause(f"tenant:{TENANT}")
        kept = await jobs.add(3)
        others = await jobs.add(3, tenant=Tenant("other"))
        await jobs.ended(others)
        rows = [await jobs.row(job_id) for job_id in kept]
        assert {(row["state"], row["run"], row["waiting_for"]) for row in rows} == {("queued", 0, None)}
        await hand.resume(f"tenant:{TENANT}")
        await jobs.ended(kept)
    assert provider.books.total.requests == 6


async def test_jobs_under_way_go_on(jobs: Jobs, hand: Pauses, silent: ScriptedProvider) -> None:
    async with running_worker(concurrency=1):
        (first,) = await jobs.add(1)
        await silent.arrived(1)
        (second,) = await jobs.add(1)
        await hand.pause("global")
        silent.open.set()
        [ending] = await jobs.ended([first])
        assert (ending.job.state, ending.job.run) == (JobState.SUCCEEDED, 1)
        assert (await jobs.row(second))["run"] == 0


async def test_a_paused_job_whose_gate_is_lost_waits_in_its_queue_until_the_gate_is_back(
    jobs: Jobs, redis: Redis, hand: Pauses, provider: SimulatedProvider
) -> None:
    async with running_worker():
        others = await jobs.add(1, tenant=Tenant("other"))
        await jobs.ended(others)
        await pauses.pause(jobs.pool, f"tenant:{TENANT}", None)
        kept = await jobs.add(5)

        async def gates() -> list[str]:
            return await jobs.dispatch.gates()

        await eventually(gates, lambda found: found == [f"tenant:{TENANT}|pause"])
        assert provider.books.total.requests == 1
        await hand.resume(f"tenant:{TENANT}")
        endings = await jobs.ended(kept)
    assert {ending.job.run for ending in endings} == {1}


# The command.


async def test_the_command_pauses_shows_and_resumes(jobs: Jobs, command: Command) -> None:
    assert "Nothing is paused" in (await command("pauses")).out
    done = await command("pause", "lane:batch", "--for", "10m", "--json")
    assert done.answer["scope"] == "lane:batch"
    paused = await command("pause", "tenant:never-seen")
    assert paused.out == (
        "tenant:never-seen is paused until resumed: what runs goes on, the rest waits in its queues.\n"
    )
    shown = (await command("pauses", "--json")).rows("pauses")
    assert [(one["scope"], one["until"] is None) for one in shown] == [
        ("lane:batch", False),
        ("tenant:never-seen", True),
    ]
    assert "tenant:never-seen" in (await command("pauses")).out
    assert await jobs.dispatch.gates() == ["lane:batch|pause", "tenant:never-seen|pause"]
    resumed = await command("resume", "lane:batch", "--json")
    assert resumed.answer == {"scope": "lane:batch", "resumed": True}
    again = await command("queues", "resume", "lane:batch")
    assert (again.code, again.out) == (0, "lane:batch was not paused.\n")
    assert await jobs.dispatch.gates() == ["tenant:never-seen|pause"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["lane:bacth"], "There is no lane 'bacth': the lanes are interactive, default, batch."),
        (["batch"], "'batch' cannot be paused: write lane:NAME, tenant:NAME, model:NAME, or global."),
        (["lane:"], "'lane:' cannot be paused"),
        (["model:"], "'model:' cannot be paused"),
        (["target:openai/gpt-4o"], "cannot be paused"),
        (["tenant:a b"], "tenant: must be"),
        (["global", "--for", "soon"], "--for: must be a duration"),
        (["global", "--for", "0s"], "--for: must be longer than nothing."),
    ],
)
async def test_what_cannot_be_paused_is_refused_in_a_sentence(
    pool: Pool, command: Command, arguments: list[str], says: str
) -> None:
    done = await command("pause", *arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("headrace: ")
    assert says in done.err
    assert await pauses.in_force(pool) == []


async def test_a_lane_that_only_a_worker_knows_can_be_paused(pool: Pool, command: Command) -> None:
    await feed.register_worker(pool, ME, host="here", slots=1, lanes=("old@sum",), alive=MINUTE)
    assert (await command("pause", "lane:old")).code == 0


async def test_what_is_paused_can_be_read_from_the_hash_of_gates(redis: Redis, hand: Pauses) -> None:
    await hand.pause("model:org/gpt:4 o")
    assert await redis.hash(keys.GATES) == {"route:org%2Fgpt%3A4%20o|pause": "0"}
