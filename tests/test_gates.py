"""Gates: what keeps whole queues back, for how long, and how they come again."""

from datetime import timedelta

import pytest

from headrace_shared.budgets import Budgets
from headrace_shared.dispatch import keys
from headrace_shared.dispatch.dispatch import Dispatch, Entry, Gate, GateReason
from headrace_shared.ids import Lane, RouteName, Tenant, new_job_id
from headrace_shared.job import Queue
from headrace_shared.money import NanoUSD
from headrace_shared.store.money import BudgetPolicy, WindowKind
from headrace_shared.testing.clock import Clock, script

pytestmark = pytest.mark.conformance

LANES = {Lane("interactive"): 8, Lane("default"): 4, Lane("batch"): 1}
LEASE = timedelta(minutes=10)
PROBE = timedelta(seconds=20)
MINUTE = timedelta(minutes=1)
SECOND = timedelta(seconds=1)
BEHIND = Queue(Lane("batch"), RouteName("org/gpt:4 o"), Tenant("a|b: c"), "d|e")
BESIDE = Queue(Lane("default"), RouteName("gpt-4o"), Tenant("acme"))
DIMENSIONS = ["lane:batch", "route:org%2Fgpt%3A4%20o", "tenant:a%7Cb%3A%20c", "key:d%7Ce"]


async def push(dispatch: Dispatch, queue: Queue, count: int = 1) -> list[Entry]:
    new = [Entry(queue, new_job_id()) for _ in range(count)]
    await dispatch.push([(entry, timedelta(0)) for entry in new])
    return new


async def claim(dispatch: Dispatch, slots: int = 10) -> list[Entry]:
    return (await dispatch.claim(slots, LANES, LEASE, PROBE)).entries


async def scores(dispatch: Dispatch, queue: Queue) -> object:
    key = keys.QUEUE + keys.queue_name(queue)
    return await dispatch.redis.evaluate(
        script("return redis.call('ZRANGE', ARGV[1], 0, -1, 'WITHSCORES')"), (), [key]
    )


@pytest.mark.parametrize("reason", GateReason)
@pytest.mark.parametrize("dimension", DIMENSIONS)
async def test_jobs_behind_a_gate_are_not_touched_and_others_overtake(
    dispatch: Dispatch, dimension: str, reason: GateReason
) -> None:
    kept = await push(dispatch, BEHIND, 3)
    before = await scores(dispatch, BEHIND)
    gate = Gate(dimension, reason)
    await dispatch.close_gate(gate, None)
    others = await push(dispatch, BESIDE, 2)
    assert set(await claim(dispatch)) == set(others)
    assert await scores(dispatch, BEHIND) == before
    kept += await push(dispatch, BEHIND)
    assert await claim(dispatch) == []
    assert await dispatch.open_gate(gate)
    assert set(await claim(dispatch)) == set(kept)


@pytest.mark.parametrize("reason", GateReason)
async def test_the_global_gate_keeps_everything_back(dispatch: Dispatch, reason: GateReason) -> None:
    pushed = await push(dispatch, BEHIND) + await push(dispatch, BESIDE)
    await dispatch.close_gate(Gate("global", reason), None)
    assert await claim(dispatch) == []
    assert await dispatch.open_gate(Gate("global", reason))
    assert set(await claim(dispatch)) == set(pushed)


async def test_an_open_gate_is_not_opened_again(dispatch: Dispatch) -> None:
    assert not await dispatch.open_gate(Gate("global", GateReason.PAUSE))
    assert await dispatch.gates() == []


@pytest.mark.parametrize("reason", [GateReason.PAUSE, GateReason.BUDGET])
async def test_a_gate_with_a_duration_opens_by_itself(
    dispatch: Dispatch, clock: Clock, reason: GateReason
) -> None:
    pushed = await push(dispatch, BESIDE, 5)
    await dispatch.close_gate(Gate("tenant:acme", reason), MINUTE)
    behind = await dispatch.claim(10, LANES, LEASE, PROBE)
    assert behind.entries == []
    assert behind.next_due is not None
    assert MINUTE - SECOND < behind.next_due <= MINUTE
    await clock.advance(MINUTE - SECOND)
    assert await claim(dispatch) == []
    await clock.advance(SECOND)
    assert set(await claim(dispatch)) == set(pushed)
    assert await dispatch.gates() == []


async def test_a_gate_that_this_version_does_not_know_keeps_nobody_back(dispatch: Dispatch) -> None:
    pushed = await push(dispatch, BESIDE)
    await dispatch.redis.administer("HSET", keys.GATES, "global|what is to come", "0")
    assert await claim(dispatch) == pushed
    assert await dispatch.closed_gates() == []


async def test_a_queue_comes_back_when_the_last_of_its_gates_is_open(
    dispatch: Dispatch, clock: Clock
) -> None:
    pushed = await push(dispatch, BESIDE, 2)
    await dispatch.close_gate(Gate("global", GateReason.PAUSE), None)
    await dispatch.close_gate(Gate("lane:default", GateReason.BUDGET), MINUTE)
    await dispatch.close_gate(Gate("tenant:acme", GateReason.BUDGET), 2 * MINUTE)
    assert await claim(dispatch) == []
    await dispatch.open_gate(Gate("global", GateReason.PAUSE))
    assert await claim(dispatch) == []
    await clock.advance(MINUTE)
    assert await claim(dispatch) == []
    await clock.advance(MINUTE)
    assert set(await claim(dispatch)) == set(pushed)


async def test_opening_one_gate_leaves_queues_behind_another(dispatch: Dispatch) -> None:
    await push(dispatch, BEHIND)
    await push(dispatch, BESIDE)
    await dispatch.close_gate(Gate("lane:batch", GateReason.PAUSE), None)
    await dispatch.close_gate(Gate("lane:default", GateReason.PAUSE), None)
    assert await claim(dispatch) == []
    await dispatch.open_gate(Gate("lane:default", GateReason.PAUSE))
    assert [entry.queue for entry in await claim(dispatch)] == [BESIDE]
    assert await claim(dispatch) == []


async def test_a_gate_that_is_closed_for_a_shorter_time_lets_parked_queues_back_then(
    dispatch: Dispatch, clock: Clock
) -> None:
    pushed = await push(dispatch, BESIDE)
    for duration in (None, timedelta(days=1), MINUTE):
        await dispatch.close_gate(Gate("global", GateReason.BUDGET), duration)
        assert await claim(dispatch) == []
    await clock.advance(MINUTE)
    assert await claim(dispatch) == pushed


async def test_opening_a_gate_wakes_a_worker(dispatch: Dispatch) -> None:
    await push(dispatch, BESIDE)
    await dispatch.close_gate(Gate("global", GateReason.PAUSE), None)
    at_once = timedelta(milliseconds=10)
    assert await dispatch.wait_for_jobs(tuple(LANES), at_once)
    assert await claim(dispatch) == []
    assert not await dispatch.wait_for_jobs(tuple(LANES), at_once)
    await dispatch.open_gate(Gate("global", GateReason.PAUSE))
    assert await dispatch.wait_for_jobs(tuple(LANES), at_once)


async def test_a_put_back_job_stays_behind_a_gate_that_closed_meanwhile(
    dispatch: Dispatch, clock: Clock
) -> None:
    await push(dispatch, BESIDE)
    running = await claim(dispatch)
    await dispatch.close_gate(Gate("tenant:acme", GateReason.PAUSE), None)
    await dispatch.finish([(running[0], SECOND)])
    await clock.advance(SECOND)
    assert await claim(dispatch) == []
    await dispatch.open_gate(Gate("tenant:acme", GateReason.PAUSE))
    assert await claim(dispatch) == running


async def test_a_breakers_gate_lets_one_job_through_for_each_lease(dispatch: Dispatch, clock: Clock) -> None:
    other = Queue(Lane("default"), BEHIND.route, Tenant("other"))
    await push(dispatch, BEHIND, 50)
    await push(dispatch, other, 50)
    gate = Gate("route:org%2Fgpt%3A4%20o", GateReason.BREAKER)
    await dispatch.close_gate(gate, MINUTE)
    assert await claim(dispatch) == []
    await clock.advance(MINUTE)
    probes: list[Entry] = []
    for number in (1, 2, 3):
        probes = [*probes, *await claim(dispatch, 100)]
        assert await claim(dispatch, 100) == []
        assert len(probes) == number
        await push(dispatch, Queue(Lane("interactive"), BEHIND.route, Tenant(f"new-{number}")))
        assert await claim(dispatch, 100) == []
        await clock.advance(PROBE - SECOND)
        assert await claim(dispatch, 100) == []
        await clock.advance(SECOND)
    await dispatch.open_gate(gate)
    assert len(await claim(dispatch, 200)) == 100 + 3 - len(probes)


@pytest.mark.parametrize("delay", [None, timedelta(0), MINUTE])
async def test_a_job_that_comes_back_without_news_of_its_probe_lets_another_through(
    dispatch: Dispatch, clock: Clock, delay: timedelta | None
) -> None:
    await push(dispatch, BEHIND, 2)
    await dispatch.close_gate(Gate("route:org%2Fgpt%3A4%20o", GateReason.BREAKER), SECOND)
    await clock.advance(SECOND)
    [probe] = await claim(dispatch)
    await dispatch.finish([(probe, delay)])
    assert await claim(dispatch) == []
    await clock.advance(SECOND)
    assert len(await claim(dispatch)) == 1
    assert await claim(dispatch) == []


async def test_a_gate_stays_shut_after_the_probe_that_shut_it_anew(dispatch: Dispatch, clock: Clock) -> None:
    gate = Gate("route:org%2Fgpt%3A4%20o", GateReason.BREAKER)
    await push(dispatch, BEHIND, 2)
    await dispatch.close_gate(gate, SECOND)
    await clock.advance(SECOND)
    [probe] = await claim(dispatch)
    await dispatch.close_gate(gate, MINUTE)
    await dispatch.finish([(probe, timedelta(0))])
    await clock.advance(MINUTE - SECOND)
    assert await claim(dispatch) == []
    await clock.advance(SECOND)
    assert len(await claim(dispatch)) == 1


async def test_a_breakers_gate_keeps_its_probe_for_a_queue_that_has_a_job(
    dispatch: Dispatch, clock: Clock
) -> None:
    empty = Queue(Lane("interactive"), BESIDE.route, Tenant("empty"))
    gone = await push(dispatch, empty)
    waiting = await push(dispatch, BESIDE, 2)
    await dispatch.finish([(entry, None) for entry in gone])
    await dispatch.close_gate(Gate("route:gpt-4o", GateReason.BREAKER), MINUTE)
    await clock.advance(MINUTE)
    assert await claim(dispatch) in ([waiting[0]], [waiting[1]])


async def test_a_changed_budget_opens_the_gates_of_budgets_and_no_other(
    dispatch: Dispatch, budgets: Budgets
) -> None:
    pushed = await push(dispatch, BESIDE)
    await push(dispatch, BEHIND)
    for gate in (
        Gate("global", GateReason.BUDGET),
        Gate("tenant:acme", GateReason.BUDGET),
        Gate("lane:batch", GateReason.PAUSE),
    ):
        await dispatch.close_gate(gate, timedelta(days=1))
    assert await claim(dispatch) == []
    await budgets.set("global", WindowKind.TOTAL, NanoUSD(10), BudgetPolicy.WAIT)
    assert await claim(dispatch) == pushed
    assert await dispatch.gates() == ["lane:batch|pause"]
