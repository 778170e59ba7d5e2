"""Whatever somebody puts under our names in Redis is dropped and counted, and jobs go on."""

import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from pickle import dumps

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace_shared.budgets import Budgets
from headrace_shared.dispatch import keys
from headrace_shared.dispatch.connection import Redis
from headrace_shared.dispatch.dispatch import Dispatch, Gate, GateReason
from headrace_shared.errors import DispatchDamaged, DispatchUnavailable
from headrace_shared.ids import RouteName
from headrace_shared.job import JobState, Queue
from headrace_shared.money import NanoUSD
from headrace_shared.store.money import BudgetPolicy, WindowKind
from headrace_shared.store.pool import Pool
from headrace_shared.testing.clock import script
from headrace_shared.testing.jobs import LANE, MODEL, TENANT, Jobs, eventually
from headrace_shared.testing.server_faults import out_of_memory
from headrace_shared.testing.simulated_provider import SimulatedProvider
from headrace_shared.testing.spending import Spender, counted
from headrace_workers.testing import running_worker
from headrace_workers.worker import Worker

pytestmark = [pytest.mark.conformance, pytest.mark.usefixtures("environment")]

QUEUE = keys.queue_name(Queue(LANE, RouteName(MODEL), TENANT))
KEYED = keys.queue_name(Queue(LANE, RouteName(MODEL), TENANT, "ci"))
NAMES = {
    keys.QUEUE + QUEUE: (QUEUE,),
    keys.QUEUE + "no name of a queue": ("x",),
    keys.ACTIVE + LANE + ":" + TENANT: (QUEUE,),
    keys.TURN + LANE: (TENANT,),
    keys.RUNNING + "tenant:" + TENANT: ("x",),
    keys.FULL + "tenant:" + TENANT: (f"{LANE}:{TENANT}",),
    keys.QUEUE + KEYED: (KEYED,),
    keys.RUNNING + "key:ci": ("x",),
    keys.FULL + "key:ci": (KEYED, f"{LANE}:{TENANT}"),
    keys.OWED + LANE + ":" + TENANT: ("1",),
    keys.COST + QUEUE: ("1",),
    keys.TENANTS: ("version", f"weight|{TENANT}", f"concurrent|tenant:{TENANT}", "concurrent|key:ci"),
    keys.ACTIVE + "no lane": (QUEUE,),
    keys.BELL + LANE: ("1",),
    keys.CLOCK: ("1",),
    keys.FEEDER_BELL: ("1",),
    keys.FED: ("1",),
    keys.BREAKER + f"openai/{MODEL}": (
        "state",
        "reopen_at",
        "probe",
        "probe_until",
        "ok:123",
        "bad:9999999999999",
    ),
    keys.RETRIES + "openai": ("ok:123", "again:9999999999999", "no:1"),
    keys.WAITING: (QUEUE,),
    keys.PARKED: (QUEUE,),
    keys.GATES: ("global|pause", "global|breaker", f"route:{MODEL}|budget", "tenant:acme|budget"),
    keys.PROBING: ("0190b1f2-7d2a-7c3e-9f10-3b5a6c7d8e9f",),
    keys.WOKEN: ("0190b1f2-7d2a-7c3e-9f10-3b5a6c7d8e9f",),
    keys.DEEP: (QUEUE,),
    keys.HUNGRY: (QUEUE,),
    keys.LANES: (LANE, "served", f"floor:{LANE}"),
    keys.MONEY: ("epoch", "run_id", "end|day", "window|total", "limit|global|total", "policy|global|total"),
    keys.SPENT: ("epoch", "global|total|settled", "global|total|suspense", "global|total|held"),
    keys.HOLDS: ("epoch", "0190b1f2-7d2a-7c3e-9f10-3b5a6c7d8e9f:1:1"),
    keys.HOLD_LEASES: ("epoch",),
}
"""Every key, with fields or members that mean something in it."""

LEASE = timedelta(seconds=30)
PICKLED = dumps({"function": "headrace", "args": (), "kwargs": {}})
HUGE = b"x" * 10_000_000
ODD = [
    b"",
    b"nan",
    b"-inf",
    b"1e999",
    b"0x10",
    b" 7",
    b"1e400",
    b"9" * 400,
    b"a:b:c",
    b"\x00:\xff:\n",
    PICKLED,
]
TYPES = ("string", "list", "set", "zset", "hash", "stream")

# A key keeps what it has where the types agree, so that the damage stands in the midst of our own.
_PUT = script("""
local key, kind, field, value, score = unpack(ARGV)
local present = redis.call('TYPE', key).ok
if present ~= kind then redis.call('DEL', key) end
if kind == 'string' then redis.call('SET', key, value)
elseif kind == 'list' then redis.call('LPUSH', key, value)
elseif kind == 'set' then redis.call('SADD', key, value)
elseif kind == 'zset' then redis.call('ZADD', key, score, value)
elseif kind == 'hash' then redis.call('HSET', key, field, value)
else redis.call('XADD', key, '*', 'field', value) end
""")


@dataclass(frozen=True, slots=True)
class Damage:
    key: str
    kind: str
    field: str | bytes
    value: bytes
    score: str

    async def put(self, redis: Redis) -> None:
        await redis.evaluate(_PUT, (), [self.key, self.kind, self.field, self.value, self.score])

    @property
    def lies(self) -> bool:
        """Whether it is a number where one belongs: wrong, but nothing that could be told from ours."""
        in_place = self.key in (keys.GATES, keys.MONEY, keys.SPENT) and self.kind == "hash"
        in_place |= self.key == keys.CLOCK and self.kind == "string"
        return in_place and self.value.removeprefix(b"-").isdigit() and len(self.value) < 19


@st.composite
def damages(draw: st.DrawFn) -> Damage:
    key = draw(st.sampled_from(sorted(NAMES)))
    field = draw(st.sampled_from(NAMES[key]) | st.binary(max_size=20))
    value = draw(st.sampled_from(ODD) | st.binary(max_size=40) | st.integers().map(lambda n: str(n).encode()))
    score = draw(st.sampled_from(["0", "-inf", "inf", "1e300", "-1e300", "99999999999999", "0.5"]))
    return Damage(key, draw(st.sampled_from(TYPES)), field, value, score)


@dataclass(frozen=True, slots=True)
class Shop:
    """A worker at work, with a budget that counts."""

    worker: Worker
    jobs: Jobs
    redis: Redis
    provider: SimulatedProvider
    budgets: Budgets

    async def goes_on(self) -> None:
        """Jobs are done, each called once, and the counters say what the ledger says."""
        before = self.provider.books.total.requests
        ids = [*await self.jobs.add(2), *await self.jobs.add(1, api_key="ci")]
        endings = await self.jobs.ended(ids)
        assert [ending.job.state for ending in endings] == [JobState.SUCCEEDED] * 3
        assert self.provider.books.total.requests - before == 3
        assert await self.jobs.spend() == await self.jobs.ledger()
        settled, suspense = (await self.jobs.ledger())["global", "total"]
        await eventually(self._counted, lambda found: found == (settled, suspense, 0))

    async def _counted(self) -> tuple[int, ...]:
        # What was dropped after the last settlement is put in place by whoever holds next.
        await self.budgets.hold([])
        found = await self.redis.hash(keys.SPENT)
        return tuple(int(found.get(f"global|total|{part}", 0)) for part in ("settled", "suspense", "held"))


@pytest.fixture
def jobs(pool: Pool, dispatch: Dispatch) -> Jobs:
    return Jobs(pool, dispatch)


@pytest.fixture
async def shop(
    jobs: Jobs, redis: Redis, budgets: Budgets, provider: SimulatedProvider
) -> AsyncIterator[Shop]:
    await budgets.set("global", WindowKind.TOTAL, NanoUSD(10**15), BudgetPolicy.WAIT)
    async with running_worker() as worker:
        shop = Shop(worker, jobs, redis, provider, budgets)
        await shop.goes_on()
        yield shop


@pytest.fixture
async def spender(pool: Pool) -> Spender:
    return await Spender.start(pool)


@settings(
    max_examples=25,
    derandomize=True,
)
@given(found=st.lists(damages().filter(lambda damage: not damage.lies), min_size=1, max_size=4))
async def test_jobs_go_on_whatever_is_put_under_our_names(shop: Shop, found: list[Damage]) -> None:
    for damage in found:
        await damage.put(shop.redis)
    await shop.goes_on()


@pytest.mark.parametrize("value", [HUGE, PICKLED], ids=["huge", "pickled"])
@pytest.mark.parametrize("kind", ["string", "zset", "hash"])
async def test_huge_and_pickled_bytes_under_every_name_are_survived(
    shop: Shop, value: bytes, kind: str
) -> None:
    for key, (field, *_) in NAMES.items():
        await Damage(key, kind, field, value, "0").put(shop.redis)
    await shop.goes_on()


async def test_a_server_that_is_full_is_away_and_not_damaged(redis_url: str, dispatch: Dispatch) -> None:
    async with out_of_memory(redis_url):
        with pytest.raises(DispatchUnavailable) as caught:
            await dispatch.close_gate(Gate("global", GateReason.PAUSE), None)
        assert not isinstance(caught.value, DispatchDamaged)


@pytest.mark.parametrize("key", sorted(NAMES))
async def test_a_key_of_another_type_is_dropped_counted_and_logged_once(
    budgets: Budgets, dispatch: Dispatch, redis: Redis, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    await budgets.rebuild()
    await Damage(keys.LANES, "hash", "served", b"garbage", "0").put(redis)
    await Damage(key, "stream", "", b"text", "0").put(redis)
    with caplog.at_level(logging.WARNING):
        first = await dispatch.claim(1, {LANE: 1}, LEASE, LEASE)
        again = await dispatch.claim(1, {LANE: 1}, LEASE, LEASE)
    # The one damage that the claim met, and (but where that is the same key) the other.
    assert (first.foreign, again.foreign) == (1 if key == keys.LANES else 2, 0)
    assert len([one for one in caplog.records if "foreign bytes" in one.message]) == 1
    assert await redis.evaluate(script("return redis.call('TYPE', ARGV[1]).ok"), (), [key]) != b"stream"


@pytest.mark.parametrize("key", [keys.MONEY, keys.SPENT, keys.HOLDS])
@pytest.mark.parametrize("kind", ["gone", "string", "hash"])
async def test_no_money_is_held_on_counters_that_were_damaged(
    redis: Redis, budgets: Budgets, spender: Spender, key: str, kind: str
) -> None:
    await spender_limit(budgets)
    call = await spender.open(budgets, 30, "global")
    await budgets.settle([await spender.conclude(call, cost=25)])
    await spender.open(budgets, 40, "global")
    await redis.evaluate(script("return redis.call('DEL', ARGV[1])"), (), [key])
    if kind != "gone":
        await Damage(key, kind, "global|total|held", b"0", "0").put(redis)
    assert (await spender.refused(budgets, 36, "global")).missing == 1
    assert await counted(redis, "global") == (25, 0, 40)


@pytest.mark.parametrize("key", [keys.MONEY, keys.SPENT, keys.HOLDS])
async def test_what_is_settled_on_lost_counters_is_put_in_place_from_the_ledger(
    redis: Redis, budgets: Budgets, spender: Spender, key: str
) -> None:
    await spender_limit(budgets)
    free, paid = await spender.open(budgets, 0, "global"), await spender.open(budgets, 40, "global")
    settlement = await spender.conclude(free, cost=0)
    await redis.evaluate(script("return redis.call('DEL', ARGV[1])"), (), [key])
    await budgets.settle([settlement])
    assert await counted(redis, "global") == (0, 0, 40)
    await budgets.settle([await spender.conclude(paid, cost=39)])
    assert await counted(redis, "global") == (39, 0, 0)


@pytest.mark.parametrize("value", [b"nan", b"0x1", b"-inf", b"", b"1.5", b"1e2", HUGE])
async def test_a_counter_that_cannot_be_read_is_put_right_from_the_ledger(
    redis: Redis, budgets: Budgets, spender: Spender, value: bytes
) -> None:
    await spender_limit(budgets)
    call = await spender.open(budgets, 30, "global")
    await budgets.settle([await spender.conclude(call, cost=25)])
    open_call = await spender.open(budgets, 40, "global")
    await Damage(keys.SPENT, "hash", "global|total|settled", value, "0").put(redis)
    assert (await spender.refused(budgets, 36, "global")).missing == 1
    await Damage(keys.SPENT, "hash", "global|total|held", value, "0").put(redis)
    await budgets.settle([await spender.conclude(open_call, cost=39)])
    assert await counted(redis, "global") == (64, 0, 0)


async def test_more_released_than_was_held_is_put_right_from_the_ledger(
    redis: Redis, budgets: Budgets, spender: Spender
) -> None:
    """A number can be wrong and look right: it is not believed once it cannot be true."""
    await spender_limit(budgets)
    open_call = await spender.open(budgets, 40, "global")
    await spender.open(budgets, 30, "global")
    await Damage(keys.SPENT, "hash", "global|total|held", b"10", "0").put(redis)
    await budgets.settle([await spender.conclude(open_call, cost=39)])
    assert await counted(redis, "global") == (39, 0, 30)


async def test_an_epoch_that_the_ledger_never_had_is_forgotten(
    redis: Redis, budgets: Budgets, spender: Spender
) -> None:
    await spender_limit(budgets)
    await spender.open(budgets, 40, "global")
    for key in (keys.MONEY, keys.SPENT, keys.HOLDS):
        await Damage(key, "hash", "epoch", b"999999999", "0").put(redis)
    assert (await spender.refused(budgets, 61, "global")).missing == 1
    assert await counted(redis, "global") == (0, 0, 40)


async def test_leases_of_no_holds_are_taken_out(redis: Redis, budgets: Budgets) -> None:
    await budgets.rebuild()
    for value in ODD:
        await Damage(keys.HOLD_LEASES, "zset", "", value, "0").put(redis)
    assert await budgets.expired_holds() == []
    assert await redis.evaluate(script("return redis.call('ZCARD', ARGV[1])"), (), [keys.HOLD_LEASES]) == 0


async def spender_limit(budgets: Budgets) -> None:
    await budgets.set("global", WindowKind.TOTAL, NanoUSD(100), BudgetPolicy.WAIT)
