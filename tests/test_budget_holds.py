"""Budgets: held over all scopes or none, settled once, and right again after any loss."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from headrace_shared import budgets as budgets_module
from headrace_shared.budgets import HOLD_LEASE, Budgets, Held, HoldRequest, Settlement
from headrace_shared.dispatch import keys
from headrace_shared.dispatch.connection import Argument, Redis, Script
from headrace_shared.ids import HoldId
from headrace_shared.money import NanoUSD
from headrace_shared.store import money
from headrace_shared.store.money import BudgetPolicy, Refused, WindowKind
from headrace_shared.store.pool import Pool
from headrace_shared.testing.clock import Clock, script
from headrace_shared.testing.spending import Call, Spender, counted, flush
from headrace_workers.reaper import Reaper

pytestmark = pytest.mark.conformance

DAY = timedelta(days=1)
GLOBAL, ACME, OTHER = "global", "tenant:acme", "tenant:other"


async def limit(budgets: Budgets, scope: str, amount: int, kind: WindowKind = WindowKind.TOTAL) -> None:
    await budgets.set(scope, kind, NanoUSD(amount), BudgetPolicy.WAIT)


@pytest.fixture
async def spender(pool: Pool, clock: Clock) -> Spender:
    """At noon in the middle of next month, far from the turn of any window."""
    now = datetime.now(UTC)
    middle = (now.replace(day=1) + 32 * DAY).replace(day=15, hour=12, minute=0, second=0, microsecond=0)
    await clock.advance(middle - now)
    return await Spender.start(pool)


async def test_a_hold_is_over_all_scopes_or_none(spender: Spender, budgets: Budgets, redis: Redis) -> None:
    await limit(budgets, GLOBAL, 100)
    await limit(budgets, ACME, 50)
    refused = await spender.refused(budgets, 60, GLOBAL, ACME)
    assert refused == Refused(
        ACME, WindowKind.TOTAL, NanoUSD(50), NanoUSD(10), NanoUSD(0), None, BudgetPolicy.WAIT
    )
    assert await counted(redis, GLOBAL) == (0, 0, 0)
    await spender.hold(budgets, 50, GLOBAL, ACME)
    assert await counted(redis, GLOBAL) == await counted(redis, ACME) == (0, 0, 50)
    await spender.hold(budgets, 50, GLOBAL, OTHER)
    refused = await spender.refused(budgets, 1, GLOBAL, OTHER)
    assert (refused.scope, refused.missing, refused.held_by_others) == (GLOBAL, 1, 100)


async def test_in_one_batch_each_hold_stands_for_itself(budgets: Budgets, redis: Redis) -> None:
    await limit(budgets, GLOBAL, 100)
    requests = [HoldRequest(HoldId(f"h{n}"), NanoUSD(n), (GLOBAL,)) for n in (60, 50, 40, 1)]
    answers = await budgets.hold(requests)
    assert [isinstance(answer, Held) for answer in answers] == [True, False, True, False]
    assert await counted(redis, GLOBAL) == (0, 0, 100)


async def test_a_hold_is_settled_once_and_an_unknown_one_not_at_all(
    spender: Spender, budgets: Budgets, redis: Redis
) -> None:
    await limit(budgets, GLOBAL, 100)
    paid, lost = await spender.open(budgets, 30, GLOBAL), await spender.open(budgets, 20, GLOBAL)
    settlements = [await spender.conclude(paid, cost=7), await spender.conclude(lost, suspense=20)]
    for _ in range(2):
        await budgets.settle([*settlements, Settlement(HoldId("nobody's"), NanoUSD(99))])
        assert await counted(redis, GLOBAL) == (7, 20, 0)
    (view,) = await budgets.view()
    assert (view.state.settled, view.state.suspense, view.held, view.remaining) == (7, 20, 0, 73)
    await budgets.rebuild()
    assert await counted(redis, GLOBAL) == (7, 20, 0)


async def test_a_changed_limit_holds_at_once_for_every_process(
    spender: Spender, pool: Pool, budgets: Budgets, redis: Redis
) -> None:
    elsewhere = Budgets(pool, redis)
    await limit(budgets, GLOBAL, 100)
    await spender.open(elsewhere, 60, GLOBAL)
    await limit(budgets, GLOBAL, 50)
    refused = await spender.refused(elsewhere, 1, GLOBAL)
    assert (refused.limit, refused.missing, refused.held_by_others) == (50, 11, 60)
    await limit(budgets, GLOBAL, 70)
    await spender.refused(elsewhere, 11, GLOBAL)
    await spender.hold(elsewhere, 10, GLOBAL)
    assert await budgets.remove(GLOBAL, WindowKind.TOTAL)
    await spender.hold(elsewhere, 10**15, GLOBAL)
    assert await budgets.view() == []


@pytest.mark.parametrize(("kind", "turn"), [(WindowKind.DAY, DAY), (WindowKind.MONTH, 30 * DAY)])
async def test_a_window_turns_and_a_hold_stays_in_its_own(
    spender: Spender, budgets: Budgets, clock: Clock, kind: WindowKind, turn: timedelta
) -> None:
    await limit(budgets, GLOBAL, 100, kind)
    await limit(budgets, ACME, 1000)
    before, late = (
        await spender.open(budgets, 60, GLOBAL, ACME),
        await spender.open(budgets, 40, GLOBAL, ACME),
    )
    refused = await spender.refused(budgets, 1, GLOBAL, ACME)
    assert (refused.kind, refused.held_by_others) == (kind, 100)
    assert refused.ends_in is not None
    assert timedelta(0) < refused.ends_in <= turn
    await budgets.settle([await spender.conclude(before, cost=50)])
    await clock.advance(turn)
    after = await spender.open(budgets, 90, GLOBAL, ACME)
    await budgets.settle([await spender.conclude(late, cost=40), await spender.conclude(after, cost=80)])
    (day, total) = await budgets.view()
    assert (day.state.settled, day.held) == (80, 0)
    assert (total.state.settled, total.held) == (170, 0)
    assert (await spender.refused(budgets, 21, GLOBAL)).missing == 1


@pytest.mark.parametrize("loss", ["flush", "snapshot", "epoch"])
async def test_lost_or_old_counters_are_rebuilt_before_anything_is_held(
    spender: Spender, pool: Pool, budgets: Budgets, redis: Redis, loss: str
) -> None:
    await limit(budgets, GLOBAL, 100)
    settled = await spender.open(budgets, 30, GLOBAL)
    await budgets.settle([await spender.conclude(settled, cost=25)])
    open_call = await spender.open(budgets, 40, GLOBAL)
    unsent = await spender.hold(budgets, 10, GLOBAL)
    process = budgets
    if loss == "flush":
        await flush(redis)
    else:
        # What a server that was restarted from an old snapshot would say.
        old = {"run_id": "another"} if loss == "snapshot" else {"epoch": str(budgets.epoch - 1)}
        for field, value in old.items():
            await redis.evaluate(
                script("return redis.call('HSET', unpack(ARGV))"), (), [keys.MONEY, field, value]
            )
        await redis.evaluate(
            script("return redis.call('DEL', ARGV[1], ARGV[2])"), (), [keys.SPENT, keys.HOLDS]
        )
        process = Budgets(pool, redis)
    assert (await spender.refused(process, 36, GLOBAL)).missing == 1
    assert await counted(redis, GLOBAL) == (25, 0, 40)
    assert not await spender.intend(unsent)
    await spender.open(process, 35, GLOBAL)
    await budgets.settle([await spender.conclude(open_call, cost=39)])
    assert await counted(redis, GLOBAL) == (64, 0, 35)


async def test_processes_that_rebuild_at_once_agree(
    spender: Spender, pool: Pool, budgets: Budgets, redis: Redis
) -> None:
    await limit(budgets, GLOBAL, 100)
    await spender.open(budgets, 40, GLOBAL)
    processes = [Budgets(pool, redis) for _ in range(4)]
    for _ in range(5):
        await flush(redis)
        await asyncio.gather(*(process.rebuild() for process in processes), limit(budgets, GLOBAL, 100))
        for process in processes:
            assert (await spender.refused(process, 61, GLOBAL)).missing == 1
            assert process.epoch == await money.current_epoch(pool)
        assert await counted(redis, GLOBAL) == (0, 0, 40)


async def test_counters_that_everybody_misses_are_put_in_place_by_one(
    spender: Spender, pool: Pool, budgets: Budgets, redis: Redis
) -> None:
    """Each that does it makes void what the others have just put in place: a fleet could go on for ever."""
    await limit(budgets, GLOBAL, 100)
    processes = [Budgets(pool, redis) for _ in range(12)]
    for process in processes:
        await spender.refused(process, 101, GLOBAL)
    for round_number in range(3):
        await flush(redis)
        before = await money.current_epoch(pool)
        await asyncio.gather(*(spender.refused(process, 101, GLOBAL) for process in processes))
        assert await money.current_epoch(pool) == before + 1, round_number


@pytest.mark.parametrize("forever", ["without an end", "for a day"])
async def test_a_turn_that_somebody_else_wrote_keeps_nobody_waiting(
    spender: Spender, budgets: Budgets, redis: Redis, forever: str
) -> None:
    await limit(budgets, GLOBAL, 100)
    await flush(redis)
    end = () if forever == "without an end" else ("EX", 86400)
    await redis.administer("SET", keys.REBUILDING, "1", *end)
    assert (await spender.refused(budgets, 101, GLOBAL)).missing == 1


@dataclass(frozen=True, slots=True)
class Interrupted:
    """A database in which something happens right before or right after the counters are read."""

    pool: Pool
    before: Callable[[], Awaitable[None]]
    after: Callable[[], Awaitable[None]]

    async def fetch(self, query: str, *args: object) -> Sequence[asyncpg.Record]:
        return await self.pool.fetch(query, *args)

    async def execute(self, query: str, *args: object) -> str:
        return await self.pool.execute(query, *args)

    async def fetchrow(self, query: str, *args: object) -> asyncpg.Record | None:
        reading = "headrace.spend" in query
        if reading:
            await self.before()
        row = await self.pool.fetchrow(query, *args)
        if reading:
            await self.after()
        return row


@pytest.mark.parametrize("order", [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3), (2, 2), (2, 3), (3, 3)])
async def test_a_settlement_that_races_a_rebuild_counts_once_and_at_once(
    spender: Spender,
    redis: Redis,
    budgets: Budgets,
    pool: Pool,
    *,
    order: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Concluded, and later settled, before the rebuild (0), around its reading (1, 2), after it (3)."""
    concluded_in, settled_in = order
    await limit(budgets, GLOBAL, 100)
    call = await spender.open(budgets, 60, GLOBAL)
    settlements: list[Settlement] = []
    settling: list[asyncio.Task[None]] = []
    kept_waiting = asyncio.Event()
    evaluate = Redis.evaluate

    async def watched(
        redis: Redis, what: Script, names: Sequence[str] = (), values: Sequence[Argument] = ()
    ) -> object:
        reply = await evaluate(redis, what, names, values)
        if what.name == "rebuild_turn" and reply == 0:
            kept_waiting.set()
        return reply

    monkeypatch.setattr(Redis, "evaluate", watched)

    async def reach(point: int) -> None:
        if point == concluded_in:
            settlements.append(await spender.conclude(call, cost=33))
        if point == settled_in:
            settling.append(asyncio.create_task(budgets.settle(settlements)))
            waiting = asyncio.create_task(kept_waiting.wait())
            await asyncio.wait([*settling, waiting], return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()

    await reach(0)
    await Budgets(Interrupted(pool, lambda: reach(1), lambda: reach(2)), redis).rebuild()
    await reach(3)
    await asyncio.gather(*settling)
    assert await counted(redis, GLOBAL) == (33, 0, 0)
    await budgets.settle(settlements)
    assert await counted(redis, GLOBAL) == (33, 0, 0)


async def test_a_hold_whose_call_was_booked_and_never_settled_is_settled_by_the_ledger(
    spender: Spender, redis: Redis, clock: Clock, reaper: Reaper, budgets: Budgets
) -> None:
    """Its worker died between the two."""
    await limit(budgets, GLOBAL, 100)
    settlement = await spender.conclude(await spender.open(budgets, 60, GLOBAL), cost=33)
    await reaper.turn()
    assert await counted(redis, GLOBAL) == (0, 0, 60)
    await clock.advance(HOLD_LEASE)
    await reaper.turn()
    assert await counted(redis, GLOBAL) == (33, 0, 0)
    await budgets.settle([settlement])
    assert await counted(redis, GLOBAL) == (33, 0, 0)


async def test_nothing_is_settled_between_two_rebuilds_that_overlap(
    spender: Spender, redis: Redis, budgets: Budgets, pool: Pool
) -> None:
    """The elder read the ledger for longer than its turn lasts, and the younger has read it as well."""
    await limit(budgets, GLOBAL, 100)
    call = await spender.open(budgets, 60, GLOBAL)
    has_read, goes_on = asyncio.Event(), asyncio.Event()

    async def nothing() -> None:
        pass

    async def overstay() -> None:
        has_read.set()
        await goes_on.wait()

    elder = Budgets(Interrupted(pool, nothing, overstay), redis)
    rebuilding = asyncio.create_task(elder.rebuild())
    await has_read.wait()
    await redis.administer("DEL", keys.REBUILDING)

    settlements: list[Settlement] = []

    async def overtake() -> None:
        settlements.append(await spender.conclude(call, cost=33))
        goes_on.set()
        await rebuilding
        assert "epoch" not in await redis.hash(keys.MONEY)

    await Budgets(Interrupted(pool, nothing, overtake), redis).rebuild()
    await elder.settle(settlements)
    assert await counted(redis, GLOBAL) == (33, 0, 0)


@pytest.mark.parametrize("point", ["before", "after"])
async def test_an_intent_that_races_a_rebuild_is_refused_or_held(
    spender: Spender, pool: Pool, budgets: Budgets, redis: Redis, point: str
) -> None:
    await limit(budgets, GLOBAL, 100)
    call = await spender.hold(budgets, 60, GLOBAL)
    accepted: list[bool] = []

    async def intend() -> None:
        accepted.append(await spender.intend(call))

    async def nothing() -> None:
        pass

    hooks = (intend, nothing) if point == "before" else (nothing, intend)
    await Budgets(Interrupted(pool, *hooks), redis).rebuild()
    assert await counted(redis, GLOBAL) == (0, 0, 60 if accepted[0] else 0)


async def test_a_rebuild_that_was_overtaken_changes_nothing(
    spender: Spender, pool: Pool, budgets: Budgets, redis: Redis
) -> None:
    await limit(budgets, GLOBAL, 100)
    calls: list[Call] = []

    async def nothing() -> None:
        pass

    async def overtake() -> None:
        await budgets.rebuild()
        calls.append(await spender.hold(budgets, 60, GLOBAL))

    slow = Budgets(Interrupted(pool, nothing, overtake), redis)
    await slow.rebuild()
    assert await counted(redis, GLOBAL) == (0, 0, 60)
    assert await spender.intend(calls[0])
    assert (await spender.refused(Budgets(pool, redis), 41, GLOBAL)).missing == 1


async def test_no_call_goes_out_on_a_hold_of_an_older_epoch(spender: Spender, budgets: Budgets) -> None:
    await limit(budgets, GLOBAL, 100)
    call = await spender.hold(budgets, 60, GLOBAL)
    await budgets.rebuild()
    assert not await spender.intend(call)
    await spender.open(budgets, 60, GLOBAL)


async def test_no_call_goes_out_on_a_hold_that_may_count_as_leaked(
    spender: Spender, budgets: Budgets, redis: Redis, clock: Clock, reaper: Reaper
) -> None:
    await limit(budgets, GLOBAL, 100)
    young, old = await spender.hold(budgets, 10, GLOBAL), await spender.hold(budgets, 60, GLOBAL)
    sent = await spender.open(budgets, 5, GLOBAL)
    await clock.advance(HOLD_LEASE / 2 - timedelta(seconds=5))
    assert await spender.intend(young)
    await clock.advance(timedelta(seconds=5))
    assert not await spender.intend(old)
    await clock.advance(HOLD_LEASE)
    await reaper.turn()
    assert await counted(redis, GLOBAL) == (0, 0, 15)
    await budgets.settle([await spender.conclude(sent, cost=5)])
    assert await counted(redis, GLOBAL) == (5, 0, 10)


@pytest.mark.parametrize("asked", [True, False])
async def test_a_rebuild_that_died_half_way_is_noticed(
    spender: Spender, pool: Pool, budgets: Budgets, monkeypatch: pytest.MonkeyPatch, *, asked: bool
) -> None:
    await limit(budgets, GLOBAL, 100)
    await money.raise_epoch(pool)
    if asked:
        await budgets.check_epoch()
    else:
        monkeypatch.setattr(budgets_module, "CHECK_EVERY", timedelta(0))
    await spender.open(budgets, 60, GLOBAL)


async def test_distrusted_counters_are_rebuilt(spender: Spender, budgets: Budgets, redis: Redis) -> None:
    await limit(budgets, GLOBAL, 100)
    call = await spender.open(budgets, 60, GLOBAL)
    await spender.conclude(call, cost=20)
    budgets.distrust()
    await spender.hold(budgets, 80, GLOBAL)
    assert await counted(redis, GLOBAL) == (20, 0, 80)


async def test_great_amounts_are_counted_to_the_nano(
    spender: Spender, budgets: Budgets, redis: Redis
) -> None:
    most = 9_000_000_000_000_000
    await limit(budgets, GLOBAL, most)
    odd = await spender.open(budgets, most - 4, GLOBAL)
    rest = await spender.open(budgets, 3, GLOBAL)
    assert (await spender.refused(budgets, 2, GLOBAL)).missing == 1
    assert isinstance(await spender.try_hold(budgets, most, GLOBAL), Refused)
    last = await spender.open(budgets, 1, GLOBAL)
    settlements = [
        await spender.conclude(odd, cost=most - 5),
        await spender.conclude(rest, suspense=3),
        await spender.conclude(last, cost=1),
    ]
    await budgets.settle(settlements)
    assert await counted(redis, GLOBAL) == (most - 4, 3, 0)
    await spender.refused(budgets, 2, GLOBAL)
    await budgets.rebuild()
    assert await counted(redis, GLOBAL) == (most - 4, 3, 0)
    await spender.hold(budgets, 1, GLOBAL)


async def test_a_call_that_cannot_cost_anything_is_settled_like_any_other(
    spender: Spender, budgets: Budgets, redis: Redis
) -> None:
    await limit(budgets, GLOBAL, 100)
    epoch = budgets.epoch
    free = await spender.open(budgets, 0, GLOBAL)
    await budgets.settle([await spender.conclude(free, cost=0)])
    assert await counted(redis, GLOBAL) == (0, 0, 0)
    assert budgets.epoch == epoch
