"""Who is next: all tenants alike by cost, no more at a time than they may, and nobody waits for a flood."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta
from random import Random

import pytest

from headrace_shared.dispatch import keys
from headrace_shared.dispatch.connection import Redis
from headrace_shared.dispatch.dispatch import Dispatch, Entry, Gate, GateReason
from headrace_shared.ids import JobId, Lane, RouteName, Tenant, WorkerId, new_job_id
from headrace_shared.job import Queue
from headrace_shared.money import NanoUSD
from headrace_shared.policy import NO_TERMS, Terms
from headrace_shared.store import claims
from headrace_shared.store.pool import Pool
from headrace_shared.testing.clock import Clock, script
from headrace_shared.testing.jobs import LANE, MODEL, TENANT, Jobs, eventually
from headrace_shared.testing.spending import flush
from headrace_workers.feeder import Feeder
from headrace_workers.testing import running_worker

pytestmark = pytest.mark.conformance

LANES = {Lane("interactive"): 8, LANE: 4}
LEASE = timedelta(seconds=30)
NOW = timedelta(0)
LEAST = 10_000
A, B, C = Tenant("a"), Tenant("b"), Tenant("c")


def jain(shares: Sequence[float]) -> float:
    """1 where all get the same, 1/n where one gets everything."""
    return sum(shares) ** 2 / (len(shares) * sum(share * share for share in shares))


def queue(tenant: Tenant, *, lane: Lane = LANE, route: str = MODEL) -> Queue:
    return Queue(lane, RouteName(route), tenant)


def terms(version: int = 1, *, weights: Mapping[Tenant, int] | None = None, **most: int) -> Terms:
    return Terms(version, weights or {}, {Tenant(name): count for name, count in most.items()})


async def push(dispatch: Dispatch, of: Queue, count: int = 1) -> list[Entry]:
    new = [Entry(of, new_job_id()) for _ in range(count)]
    await dispatch.push([(entry, NOW) for entry in new])
    return new


class Fleet:
    """Slots that are filled by claims; their jobs end in an order that a seed decides."""

    def __init__(self, dispatch: Dispatch, costs: Mapping[Tenant, int], *, slots: int, seed: int = 1) -> None:
        self.dispatch = dispatch
        self.terms = NO_TERMS
        self.spent = Counter[Tenant]()
        self.running: list[Entry] = []
        self._costs = costs
        self._slots = slots
        self._random = Random(seed)  # noqa: S311

    async def fill(self, most: int = 10**6) -> list[Entry]:
        free = min(most, self._slots - len(self.running))
        claim = await self.dispatch.claim(free, LANES, LEASE, LEASE, terms=self.terms)
        self.running += claim.entries
        return claim.entries

    async def end(self, count: int) -> list[Entry]:
        """End some of the jobs that run."""
        self._random.shuffle(self.running)
        ended, self.running = self.running[:count], self.running[count:]
        costs = {one: self._cost(one) for one in ended}
        await self.dispatch.finish([(one, None) for one in ended], costs=costs)
        for one in ended:
            self.spent[one.queue.tenant] += max(costs[one], LEAST)
        return ended

    def _cost(self, entry: Entry) -> NanoUSD:
        return NanoUSD(round(self._costs[entry.queue.tenant] * self._random.uniform(0.5, 1.5)))

    async def run(self, budget: int) -> None:
        """Go on until a tenant was given so much."""
        while max(self.spent.values(), default=0) < budget:
            await self.fill()
            await self.end(self._random.randint(1, 8))


async def test_tenants_get_the_same_by_cost_however_many_jobs_and_queues_they_have(
    dispatch: Dispatch,
) -> None:
    costs = {A: 400_000, B: 50_000, C: 2_000_000, Tenant("free"): 0}
    for route in range(10):
        await push(dispatch, queue(A, route=f"r{route}"), 100)
    await push(dispatch, queue(B), 2000)
    await push(dispatch, queue(C), 60)
    await push(dispatch, queue(Tenant("free")), 4000)
    fleet = Fleet(dispatch, costs, slots=20)
    await fleet.run(60_000_000)
    assert jain([fleet.spent[tenant] for tenant in costs]) >= 0.95, fleet.spent


async def test_tenants_get_their_weights_by_cost(dispatch: Dispatch) -> None:
    await push(dispatch, queue(A), 600)
    await push(dispatch, queue(B), 600)
    fleet = Fleet(dispatch, {A: 1_000_000, B: 300_000}, slots=10)
    fleet.terms = terms(weights={A: 3})
    await fleet.run(150_000_000)
    assert fleet.spent[A] / fleet.spent[B] == pytest.approx(3, rel=0.15)


async def test_the_queues_of_a_tenant_take_turns(dispatch: Dispatch) -> None:
    for route in ("x", "y", "z"):
        await push(dispatch, queue(A, route=route), 50)
    await push(dispatch, queue(B), 50)
    claimed = [entry for _ in range(6) for entry in (await dispatch.claim(6, LANES, LEASE, LEASE)).entries]
    assert Counter(entry.queue.tenant for entry in claimed) == {A: 18, B: 18}
    routes = Counter(entry.queue.route for entry in claimed if entry.queue.tenant == A)
    assert set(routes.values()) == {6}


async def test_a_backlog_a_thousand_times_as_deep_gets_no_more(pool: Pool, redis: Redis) -> None:
    """It waits in the store, behind a window; the feeder brings it as it is taken."""
    dispatch = Dispatch(redis, window=20)
    jobs = Jobs(pool, dispatch)
    small = [Tenant(f"small-{number}") for number in range(5)]
    await jobs.add(5000, tenant=A)
    for tenant in small:
        await jobs.add(5, tenant=tenant)
    feeder = Feeder(pool, dispatch, listen_url=None, window=20)
    await feeder.turn()
    fleet = Fleet(dispatch, dict.fromkeys([A, *small], 1_000_000), slots=6)
    taken = Counter[Tenant]()
    while sum(taken[tenant] for tenant in small) < 25:
        found = await fleet.fill()
        await claims.claim_jobs(pool, [entry.id for entry in found], WorkerId("w"), LEASE)
        taken.update(entry.queue.tenant for entry in found)
        await fleet.end(3)
        await feeder.turn()
    assert jain([taken[tenant] for tenant in (A, *small)]) >= 0.95, taken


@pytest.mark.parametrize("cost", [10**9, 10**10, 0], ids=["", "charged too little", "charged too much"])
async def test_a_single_job_has_the_first_slot_that_is_free(dispatch: Dispatch, cost: int) -> None:
    """Whatever those cost that are out, and were charged a dollar each."""
    costs = {A: 10**9, B: 1_000_000}
    fleet = Fleet(dispatch, costs, slots=20)
    await push(dispatch, queue(A), 2000)
    for _ in range(100):
        await fleet.fill(1)
        await fleet.end(len(fleet.running) - 19)
    costs[A] = cost
    await fleet.end(18)
    (lone,) = await push(dispatch, queue(B))
    assert await fleet.fill(1) == [lone]


async def test_who_leaves_for_a_moment_does_not_begin_anew(dispatch: Dispatch) -> None:
    fleet = Fleet(dispatch, {A: 10**9, B: 1_000_000}, slots=1)
    await push(dispatch, queue(B), 1000)
    await push(dispatch, queue(A))
    for _ in range(10):
        await fleet.fill()
        await fleet.end(1)
    assert fleet.spent[A] > 0
    (again,) = await push(dispatch, queue(A))
    for _ in range(20):
        assert again not in await fleet.fill()
        await fleet.end(1)


async def test_who_comes_with_one_job_at_a_time_gets_no_more(dispatch: Dispatch) -> None:
    fleet = Fleet(dispatch, {A: 100_000_000, B: 1_000_000}, slots=16)
    await push(dispatch, queue(B), 3000)
    while fleet.spent[B] < 1_500_000_000:
        if await dispatch.due([queue(A)]) == [0]:
            await push(dispatch, queue(A))
        await fleet.fill()
        await fleet.end(16)
    assert fleet.spent[A] / fleet.spent[B] == pytest.approx(1, rel=0.2)


@pytest.mark.usefixtures("environment", "provider")
async def test_what_a_job_cost_is_what_its_tenant_is_charged(pool: Pool, dispatch: Dispatch) -> None:
    jobs = Jobs(pool, dispatch)
    async with running_worker():
        ids = await jobs.add(30)
        await jobs.ended(ids)
        ledger = (await jobs.ledger())["global", "total"][0]
        of = queue(TENANT)
        queue_cost = await eventually(lambda: costs_of(dispatch, of), lambda found: abs(found[2]) < 1)
    assert queue_cost[0] == pytest.approx(ledger / 30, rel=0.3)
    assert queue_cost[1] == pytest.approx(0, abs=1e-6)


async def test_calls_of_jobs_that_go_on_are_charged_at_once(dispatch: Dispatch) -> None:
    """A handler makes many; of its last one alone nobody would know what it cost."""
    for tenant in (A, B):
        await push(dispatch, queue(tenant), 40)
    fleet = Fleet(dispatch, {A: LEAST, B: LEAST}, slots=2)
    (first, _) = await fleet.fill()
    await dispatch.finish([], costs={first: NanoUSD(20 * LEAST)})
    others = Counter[Tenant]()
    for _ in range(10):
        await fleet.end(1)
        others.update(entry.queue.tenant for entry in await fleet.fill())
    assert others[first.queue.tenant] <= 1


async def test_many_jobs_of_a_tenant_end_at_once(dispatch: Dispatch) -> None:
    """As those do that all wait for one answer: more than a Lua call takes values."""
    entries = await push(dispatch, queue(A), 9000)
    await dispatch.finish([(entry, None) for entry in entries])
    left = await dispatch.redis.evaluate(_CARD, [keys.QUEUE + keys.queue_name(queue(A))])
    assert left == 0


_CARD = script("return redis.call('ZCARD', KEYS[1])")


async def costs_of(dispatch: Dispatch, of: Queue) -> list[float]:
    text = await dispatch.redis.text(keys.COST + keys.queue_name(of))
    parts = ("-1", "-1", "-1") if text is None else text.split()
    return [math.nan if part == "-" else float(part) for part in parts]


# Caps.


async def begin(dispatch: Dispatch) -> None:
    await dispatch.begin_afresh()


async def claim(dispatch: Dispatch, said: Terms, slots: int = 10) -> list[Entry]:
    return (await dispatch.claim(slots, LANES, LEASE, LEASE, terms=said)).entries


async def test_a_tenant_runs_no_more_at_a_time_than_it_may_and_others_overtake(dispatch: Dispatch) -> None:
    await begin(dispatch)
    said = terms(a=3)
    await push(dispatch, queue(A), 5)
    await push(dispatch, queue(A, route="other"), 5)
    await push(dispatch, queue(A, lane=Lane("interactive")), 5)
    await push(dispatch, queue(B), 4)
    running = await claim(dispatch, said, 20)
    assert Counter(entry.queue.tenant for entry in running) == {A: 3, B: 4}
    assert await claim(dispatch, said, 20) == []
    mine = [entry for entry in running if entry.queue.tenant == A]
    await dispatch.finish([(mine[0], None), (mine[1], timedelta(hours=1))])
    assert [entry.queue.tenant for entry in await claim(dispatch, said, 20)] == [A, A]
    assert await claim(dispatch, said, 20) == []


async def test_a_job_that_ends_wakes_a_worker_for_the_lanes_of_its_tenant(dispatch: Dispatch) -> None:
    await begin(dispatch)
    said = terms(a=1)
    await push(dispatch, queue(A), 2)
    first = await claim(dispatch, said)
    other = await push(dispatch, queue(A, lane=Lane("interactive")), 1)
    assert await claim(dispatch, said) == []
    at_once = timedelta(milliseconds=10)
    while await dispatch.wait_for_jobs(tuple(LANES), at_once):
        pass
    await dispatch.finish([(first[0], None)])
    assert await dispatch.wait_for_jobs([Lane("interactive")], at_once)
    assert await claim(dispatch, said) == other


async def test_a_lease_that_ends_gives_its_place_free_and_one_that_is_renewed_does_not(
    dispatch: Dispatch, clock: Clock
) -> None:
    await begin(dispatch)
    said = terms(a=2)
    await push(dispatch, queue(A), 4)
    kept, lost = await claim(dispatch, said)
    await clock.advance(LEASE / 2)
    await dispatch.renew([(kept, LEASE)])
    assert await claim(dispatch, said) == []
    await clock.advance(LEASE / 2)
    (another,) = await claim(dispatch, said)
    assert another != kept
    assert await claim(dispatch, said) == []
    await dispatch.renew([(kept, LEASE), (another, LEASE)])
    await clock.advance(LEASE / 2)
    await dispatch.finish([(lost, None)])
    assert await claim(dispatch, said) == []


async def test_caps_and_weights_change_at_once_and_an_older_version_changes_nothing(
    dispatch: Dispatch,
) -> None:
    await begin(dispatch)
    await push(dispatch, queue(A), 9)
    assert len(await claim(dispatch, terms(1, a=1))) == 1
    assert len(await claim(dispatch, terms(2, a=3))) == 2
    assert await claim(dispatch, terms(1, a=9)) == []
    assert len(await claim(dispatch, terms(3))) == 6


async def test_a_cap_holds_over_the_loss_of_everything_in_redis(
    pool: Pool, redis: Redis, dispatch: Dispatch, jobs: Jobs
) -> None:
    said = terms(acme=2)
    feeder = Feeder(pool, dispatch, listen_url=None)
    await jobs.add(6)
    await feeder.turn()
    running = await claim(dispatch, said)
    await claims.claim_jobs(pool, [entry.id for entry in running], WorkerId("w"), LEASE)
    await flush(redis)
    await jobs.add(1)
    assert await claim(dispatch, said) == [], "before anybody knows what runs"
    await feeder.turn()
    assert await claim(dispatch, said) == []
    await dispatch.finish([(running[0], None)])
    assert len(await claim(dispatch, said)) == 1


async def test_tenants_that_run_as_many_as_they_may_cost_a_claim_nothing(
    dispatch: Dispatch, redis: Redis
) -> None:
    await begin(dispatch)
    full = [Tenant(f"full-{number}") for number in range(300)]
    said = Terms(1, {}, dict.fromkeys(full, 1))
    for tenant in full:
        await push(dispatch, queue(tenant), 2)
    while await claim(dispatch, said, 100):
        pass
    (mine,) = await push(dispatch, queue(B))
    before = await commands_of(redis)
    assert await claim(dispatch, said) == [mine]
    assert await commands_of(redis) - before < 100


async def commands_of(redis: Redis) -> int:
    stats = await redis.evaluate(script("return redis.call('INFO', 'commandstats')"))
    assert isinstance(stats, bytes)
    return sum(
        int(line.split("calls=")[1].split(",")[0]) for line in stats.decode().splitlines() if "=" in line
    )


async def test_a_cap_a_gate_and_a_full_window_let_everything_through_in_the_end(
    dispatch: Dispatch, clock: Clock
) -> None:
    await begin(dispatch)
    said = terms(a=2, weights={B: 5})
    random = Random(7)  # noqa: S311
    waiting = {entry for one in (A, B, C) for entry in await push(dispatch, queue(one), 30)}
    waiting |= set(await push(dispatch, queue(A, lane=Lane("interactive")), 30))
    gates = [
        Gate("tenant:a", GateReason.BUDGET),
        Gate("lane:default", GateReason.BUDGET),
        Gate("route:gpt-4o-mini", GateReason.PAUSE),
    ]
    running: list[Entry] = []
    for _ in range(400):
        found = await claim(dispatch, said, 7 - len(running))
        assert waiting.issuperset(found)
        waiting -= set(found)
        running += found
        assert sum(entry.queue.tenant == A for entry in running) <= 2
        random.shuffle(running)
        some, running = running[:3], running[3:]
        put_back = {entry for entry in some if random.random() < 0.2}
        waiting |= put_back
        await dispatch.finish(
            [
                (entry, timedelta(seconds=random.randint(0, 2)) if entry in put_back else None)
                for entry in some
            ],
            costs=dict.fromkeys(some, NanoUSD(random.randint(0, 10**6))),
        )
        await dispatch.close_gate(random.choice(gates), timedelta(seconds=random.randint(1, 3)))
        await clock.advance(timedelta(seconds=1))
        await dispatch.renew([(entry, LEASE) for entry in running])
        if not waiting and not running:
            return
    raise AssertionError(f"{len(waiting)} wait, {len(running)} run")


async def test_a_queue_that_nobody_would_claim_from_is_found_by_who_feeds(
    dispatch: Dispatch, redis: Redis
) -> None:
    (mine,) = await push(dispatch, queue(A))
    await redis.evaluate(script("return redis.call('DEL', KEYS[1])"), [keys.TURN + LANE])
    assert await claim(dispatch, NO_TERMS) == []
    assert await dispatch.due([queue(A)]) == [1]
    assert await claim(dispatch, NO_TERMS) == [mine]


# Without Redis.


async def test_claims_from_the_store_keep_weights_and_caps(pool: Pool, jobs: Jobs) -> None:
    for route in ("x", "y", "z"):
        await jobs.add(10, model=route, tenant=A, push=False)
    await jobs.add(20, tenant=B, push=False)
    await jobs.add(20, tenant=C, push=False)
    said = terms(weights={B: 2}, c=3)
    (running,) = await jobs.add(1, tenant=C, push=False)
    await claims.claim_jobs(pool, [running], WorkerId("w"), LEASE)
    picked = await claims.pick_due(pool, {LANE: 1}, 20, abilities=claims.PLAIN, terms=said)
    tenants = Counter([await tenant_of(jobs, one.id) for one in picked])
    assert tenants == {A: 6, B: 12, C: 2}


async def tenant_of(jobs: Jobs, job_id: JobId) -> str:
    return (await jobs.ending(job_id)).job.tenant


@pytest.fixture
def jobs(pool: Pool, dispatch: Dispatch) -> Jobs:
    return Jobs(pool, dispatch)
