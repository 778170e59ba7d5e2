"""Claiming: as many as there are slots, nobody's lease, fairly, and whatever lies in the queues."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pickle import dumps
from uuid import UUID, uuid4

import pytest

from headrace_shared.dispatch import keys
from headrace_shared.dispatch.connection import Argument, Redis, Script
from headrace_shared.dispatch.dispatch import Claim, Dispatch, Entry
from headrace_shared.ids import JobId, Lane, RouteName, Tenant, new_job_id
from headrace_shared.job import Queue
from headrace_shared.testing.clock import Clock, script

pytestmark = pytest.mark.conformance

SOME_UUID = UUID("0190b1f2-7d2a-7c3e-9f10-3b5a6c7d8e9f")
LANES = {Lane("interactive"): 8, Lane("default"): 4, Lane("batch"): 1}
LEASE = timedelta(seconds=30)
NOW = timedelta(0)
_COMMAND = script("return redis.call(unpack(ARGV))")


def queue(tenant: str = "acme", *, lane: str = "default", route: str = "gpt-4o") -> Queue:
    return Queue(Lane(lane), RouteName(route), Tenant(tenant))


def entries(of: Queue, count: int) -> list[Entry]:
    return [Entry(of, new_job_id()) for _ in range(count)]


async def push(dispatch: Dispatch, new: list[Entry], delay: timedelta = NOW) -> None:
    await dispatch.push([(entry, delay) for entry in new])


async def claim(dispatch: Dispatch, slots: int) -> Claim:
    return await dispatch.claim(slots, LANES, LEASE, LEASE)


async def ended(dispatch: Dispatch, claimed: Claim) -> None:
    await dispatch.finish([(entry, None) for entry in claimed.entries])


async def command(redis: Redis, *words: Argument) -> object:
    return await redis.evaluate(_COMMAND, (), words)


async def test_a_claim_takes_as_many_as_there_are_slots_in_the_order_they_are_due(dispatch: Dispatch) -> None:
    pushed = sorted(entries(queue(), 10), key=lambda entry: str(entry.id))
    await push(dispatch, pushed)
    first = await claim(dispatch, 7)
    second = await claim(dispatch, 7)
    assert [*first.entries, *second.entries] == pushed
    assert (len(first.entries), len(second.entries)) == (7, 3)


async def test_a_leased_id_is_nobody_elses_until_its_lease_ends(dispatch: Dispatch, clock: Clock) -> None:
    await push(dispatch, entries(queue(), 1))
    first = await claim(dispatch, 5)
    await clock.advance(LEASE - timedelta(seconds=1))
    assert (await claim(dispatch, 5)).entries == []
    await clock.advance(timedelta(seconds=1))
    assert (await claim(dispatch, 5)).entries == first.entries


async def test_a_renewed_lease_holds_on_and_a_missing_one_is_taken_again(
    dispatch: Dispatch, redis: Redis, clock: Clock
) -> None:
    await push(dispatch, entries(queue(), 2))
    claimed = (await claim(dispatch, 5)).entries
    await redis.remove(keys.QUEUE + keys.queue_name(queue()), str(claimed[0].id).encode())
    await clock.advance(LEASE - timedelta(seconds=1))
    await dispatch.renew([(entry, LEASE) for entry in claimed])
    await clock.advance(timedelta(seconds=2))
    assert (await claim(dispatch, 5)).entries == []
    await clock.advance(LEASE)
    assert set((await claim(dispatch, 5)).entries) == set(claimed)


async def test_what_ends_during_a_renewal_is_not_leased_again(
    dispatch: Dispatch, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    await push(dispatch, entries(queue(), 2))
    renewed, ends = (await claim(dispatch, 5)).entries
    under_way, go_on = asyncio.Event(), asyncio.Event()
    sent: list[str] = []
    evaluate = Redis.evaluate

    async def slow(
        redis: Redis, what: Script, names: Sequence[str] = (), values: Sequence[Argument] = ()
    ) -> object:
        if what.name == "renew":
            under_way.set()
            await go_on.wait()
        sent.append(what.name)
        return await evaluate(redis, what, names, values)

    monkeypatch.setattr(Redis, "evaluate", slow)
    renewing = asyncio.create_task(dispatch.renew([(renewed, LEASE), (ends, LEASE)]))
    await under_way.wait()
    finishing = asyncio.create_task(dispatch.finish([(ends, None)]))
    # After the first step of who finishes, in which it overtakes if nothing keeps it.
    asyncio.get_running_loop().call_soon(go_on.set)
    await asyncio.gather(renewing, finishing)
    assert sent == ["renew", "finish"]
    left = await command(redis, "ZRANGE", keys.QUEUE + keys.queue_name(queue()), 0, -1)
    assert left == [str(renewed.id).encode()]
    assert await command(redis, "ZRANGE", keys.RUNNING + "tenant:acme", 0, -1) == left


@pytest.mark.parametrize("told", ["before", "after"])
async def test_an_id_that_is_woken_is_due_whether_it_was_put_back_by_then_or_not(
    dispatch: Dispatch, redis: Redis, told: str
) -> None:
    await push(dispatch, entries(queue(), 1))
    (entry,) = (await claim(dispatch, 5)).entries
    if told == "before":
        await dispatch.wake([entry])
        # Its run goes on: nobody else may have it.
        assert (await claim(dispatch, 5)).entries == []
    await dispatch.finish([(entry, timedelta(minutes=1))])
    if told == "after":
        assert (await claim(dispatch, 5)).entries == []
        await dispatch.wake([entry])
    assert (await claim(dispatch, 5)).entries == [entry]
    await dispatch.finish([(entry, timedelta(minutes=1))])
    assert (await claim(dispatch, 5)).entries == []
    assert await command(redis, "EXISTS", keys.WOKEN) == 0


async def test_an_id_is_woken_although_the_worker_that_held_it_died_before_it_said_so(
    dispatch: Dispatch, redis: Redis, clock: Clock
) -> None:
    await push(dispatch, entries(queue(), 1))
    (entry,) = (await claim(dispatch, 5)).entries
    await dispatch.wake([entry])
    await clock.advance(LEASE / 3)
    assert (await claim(dispatch, 5)).entries == [entry]
    await clock.advance(timedelta(minutes=2))
    await push(dispatch, entries(queue(), 1))
    await dispatch.wake((await claim(dispatch, 5)).entries[1:])
    assert await command(redis, "ZSCORE", keys.WOKEN, str(entry.id)) is None


@pytest.mark.parametrize("till", ["inf", "1e300", "99999999999999"])
async def test_a_lease_that_nobody_can_have_keeps_no_id_from_being_woken(
    dispatch: Dispatch, redis: Redis, till: str
) -> None:
    await push(dispatch, entries(queue(), 1))
    (entry,) = (await claim(dispatch, 5)).entries
    await dispatch.finish([(entry, timedelta(hours=1))])
    await command(redis, "ZADD", keys.RUNNING + "tenant:acme", till, str(entry.id))
    await dispatch.wake([entry])
    assert (await claim(dispatch, 5)).entries == [entry]


async def test_a_renewal_that_hangs_holds_no_finish_up_for_long(
    dispatch: Dispatch, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace_shared.dispatch.dispatch._RENEWAL_PATIENCE", 0.01)
    await push(dispatch, entries(queue(), 1))
    (entry,) = (await claim(dispatch, 5)).entries
    evaluate = Redis.evaluate
    under_way = asyncio.Event()

    async def hangs(
        redis: Redis, what: Script, names: Sequence[str] = (), values: Sequence[Argument] = ()
    ) -> object:
        if what.name == "renew":
            under_way.set()
            await asyncio.Event().wait()
        return await evaluate(redis, what, names, values)

    monkeypatch.setattr(Redis, "evaluate", hangs)
    renewing = asyncio.create_task(dispatch.renew([(entry, LEASE)]))
    await under_way.wait()
    await dispatch.finish([(entry, None)])
    renewing.cancel()
    assert await command(redis, "ZCARD", keys.RUNNING + "tenant:acme") == 0


@pytest.mark.parametrize("slots", [1, 4, 13, 100])
async def test_saturated_lanes_are_served_by_their_weights(dispatch: Dispatch, slots: int) -> None:
    for lane in LANES:
        await push(dispatch, entries(queue(lane=lane), 900))
    served = Counter[Lane]()
    while served.total() < 1300:
        claimed = await claim(dispatch, slots)
        served.update(entry.queue.lane for entry in claimed.entries)
        await ended(dispatch, claimed)
    share = served.total() / 13
    for lane, weight in LANES.items():
        assert abs(served[lane] - weight * share) <= max(20, slots / 4), served


async def test_the_queues_of_a_lane_take_turns(dispatch: Dispatch) -> None:
    tenants = [f"tenant-{number}" for number in range(7)]
    for index, tenant in enumerate(tenants):
        await push(dispatch, entries(queue(tenant), 50 + 100 * index))
    for _ in range(10):
        claimed = await claim(dispatch, 28)
        assert Counter(entry.queue.tenant for entry in claimed.entries) == dict.fromkeys(tenants, 4)


async def test_what_was_idle_does_not_catch_up(dispatch: Dispatch) -> None:
    await push(dispatch, entries(queue("old"), 1000))
    await push(dispatch, entries(queue("old", lane="batch"), 1000))
    for _ in range(40):
        await claim(dispatch, 10)
    await push(dispatch, entries(queue("new"), 1000))
    await push(dispatch, entries(queue("new", lane="interactive"), 1000))
    claimed = [entry for _ in range(10) for entry in (await claim(dispatch, 26)).entries]
    lanes = Counter[str](entry.queue.lane for entry in claimed)
    tenants = Counter[str](entry.queue.tenant for entry in claimed if entry.queue.lane == "default")
    assert lanes["interactive"] == pytest.approx(160, abs=20)
    assert lanes["batch"] == pytest.approx(20, abs=10)
    assert abs(tenants["old"] - tenants["new"]) <= 10


async def test_a_put_back_id_is_due_after_its_delay(dispatch: Dispatch, clock: Clock) -> None:
    await push(dispatch, entries(queue(), 2))
    at_once, later = (await claim(dispatch, 2)).entries
    await dispatch.finish([(at_once, NOW), (later, timedelta(seconds=5))])
    assert (await claim(dispatch, 2)).entries == [at_once]
    await clock.advance(timedelta(seconds=5))
    assert (await claim(dispatch, 2)).entries == [later]


async def test_a_claim_says_when_the_next_work_is_due(dispatch: Dispatch, clock: Clock) -> None:
    assert (await claim(dispatch, 1)).next_due is None
    await push(dispatch, entries(queue(), 1), timedelta(seconds=90))
    await push(dispatch, entries(queue("other"), 1), timedelta(seconds=60))
    due = (await claim(dispatch, 1)).next_due
    assert due is not None
    assert timedelta(seconds=50) < due <= timedelta(seconds=60)
    await clock.advance(due)
    assert [entry.queue.tenant for entry in (await claim(dispatch, 5)).entries] == ["other"]


async def test_a_pushed_id_that_is_there_keeps_its_time_unless_told_otherwise(dispatch: Dispatch) -> None:
    (entry,) = entries(queue(), 1)
    await push(dispatch, [entry], timedelta(hours=1))
    await push(dispatch, [entry])
    assert (await claim(dispatch, 1)).entries == []
    await dispatch.take_back([entry])
    assert (await claim(dispatch, 1)).entries == [entry]


async def test_a_window_takes_no_more_than_it_holds_and_calls_the_feeder_at_half(redis: Redis) -> None:
    dispatch = Dispatch(redis, window=20)
    await dispatch.begin_afresh()
    await push(dispatch, entries(queue(), 30))
    await push(dispatch, entries(queue("shallow"), 19))
    assert await dispatch.due([queue("shallow")]) == [19]
    assert await command(redis, "SMEMBERS", keys.DEEP) == [keys.queue_name(queue()).encode()]
    assert await dispatch.due([queue()]) == [20]
    taken = 0
    while not await command(redis, "LLEN", keys.FEEDER_BELL):
        claimed = await claim(dispatch, 1)
        taken += claimed.entries[0].queue == queue()
        await ended(dispatch, claimed)
        assert taken < 20
    assert taken == 11
    assert await dispatch.due([queue()]) == [9]
    assert not await command(redis, "EXISTS", keys.DEEP)


async def test_one_ring_wakes_everybody_in_turn_while_work_is_left(dispatch: Dispatch) -> None:
    await push(dispatch, entries(queue(), 100))
    lanes, at_once = tuple(LANES), timedelta(milliseconds=10)
    woken = 0
    while await dispatch.wait_for_jobs(lanes, at_once):
        assert not await dispatch.wait_for_jobs(lanes, at_once), "it rang more than once"
        woken += len((await claim(dispatch, 30)).entries) > 0
    assert woken == 4


@pytest.mark.parametrize(
    "member",
    [
        b"garbage",
        b"\xff\xfe",
        b"x" * 1_000_000,
        dumps({"function": "headrace", "args": (), "kwargs": {}}),
        SOME_UUID.hex.encode(),
        f"urn:uuid:{SOME_UUID}".encode(),
        f"{{{SOME_UUID}}}".encode(),
        b"ABCDEF00-0000-7000-8000-000000000000",
        b"",
    ],
    ids=lambda member: repr(member[:12]),
)
async def test_a_foreign_member_is_counted_once_and_taken_out(
    dispatch: Dispatch, redis: Redis, clock: Clock, member: bytes
) -> None:
    (mine,) = entries(queue(), 1)
    await push(dispatch, [mine])
    await command(redis, "ZADD", keys.QUEUE + keys.queue_name(queue()), 0, member)
    claimed = await claim(dispatch, 5)
    assert (claimed.entries, claimed.foreign) == ([mine], 1)
    await clock.advance(LEASE)
    again = await claim(dispatch, 5)
    assert (again.entries, again.foreign) == ([mine], 0)


@pytest.mark.parametrize(
    "name", [b"default", b"default:a:b:c", b"default:\xff:t", b"default:%ff:t", b"default:gpt 4:t", b""]
)
async def test_a_foreign_queue_keeps_nobody_from_claiming(
    dispatch: Dispatch, redis: Redis, name: bytes
) -> None:
    await command(redis, "ZADD", keys.TURN + "default", -1, "t")
    await command(redis, "ZADD", keys.ACTIVE + "default:t", -1, name)
    await command(redis, "ZADD", keys.QUEUE.encode() + name, 0, str(new_job_id()))
    (mine,) = entries(queue(), 1)
    await push(dispatch, [mine])
    claimed = await claim(dispatch, 5)
    assert (claimed.entries, claimed.foreign) == ([mine], 1)
    assert not await command(redis, "EXISTS", keys.QUEUE.encode() + name)


async def test_a_key_of_another_type_keeps_nobody_from_claiming(dispatch: Dispatch, redis: Redis) -> None:
    await push(dispatch, entries(queue("broken"), 1))
    await command(redis, "SET", keys.QUEUE + keys.queue_name(queue("broken")), "text")
    (mine,) = entries(queue(), 1)
    await push(dispatch, [mine])
    assert (await claim(dispatch, 5)).entries == [mine]


@pytest.mark.parametrize("name", ["a:b", "50%", "a b", "%3A", "größe/模型", "a\nb", "'\"{}|", "*"])
async def test_any_name_of_a_model_or_tenant_survives_the_trip(dispatch: Dispatch, name: str) -> None:
    odd = Queue(Lane("default"), RouteName(name), Tenant(name))
    assert keys.parse_queue_name(keys.queue_name(odd)) == odd
    pushed = entries(odd, 1)
    await push(dispatch, pushed)
    claimed = await claim(dispatch, 1)
    assert claimed.entries == pushed
    await ended(dispatch, claimed)
    assert await dispatch.due([odd]) == [0]


async def test_ids_of_ended_jobs_are_gone(dispatch: Dispatch, clock: Clock) -> None:
    await push(dispatch, entries(queue(), 3))
    await ended(dispatch, await claim(dispatch, 3))
    await clock.advance(timedelta(days=1))
    assert (await claim(dispatch, 3)) == Claim([], None, 0)


async def test_two_thousand_queues_cost_a_few_commands_for_each_job(dispatch: Dispatch, redis: Redis) -> None:
    pushed = [Entry(queue(f"tenant-{number}"), JobId(uuid4())) for number in range(2000)]
    await push(dispatch, pushed)
    before = await commands_of(redis)
    claimed = set[Entry]()
    claims = 0
    while len(claimed) < len(pushed):
        claimed.update((await claim(dispatch, 100)).entries)
        claims += 1
    assert claims <= 21
    assert await commands_of(redis) - before <= 24 * len(pushed)


async def commands_of(redis: Redis) -> int:
    """How many commands the server has run, those of scripts included."""
    stats = await command(redis, "INFO", "commandstats")
    assert isinstance(stats, bytes)
    return sum(
        int(line.split("calls=")[1].split(",")[0]) for line in stats.decode().splitlines() if "=" in line
    )
