"""Retries are few beside a provider's successes, for the whole fleet together: no outage becomes a storm."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import timedelta

import pytest

from headrace_shared.configuration import Configuration
from headrace_shared.dispatch import breakers, keys, retries
from headrace_shared.dispatch.connection import Redis
from headrace_shared.dispatch.dispatch import Dispatch
from headrace_shared.ids import JobId
from headrace_shared.outcome import WaitReason
from headrace_shared.routes import Target
from headrace_shared.store.configurations import Versioned
from headrace_shared.store.pool import Pool
from headrace_shared.testing.behaviour import Behaviour
from headrace_shared.testing.books import Books
from headrace_shared.testing.clock import Clock, script
from headrace_shared.testing.jobs import LANE, MODEL, Jobs, eventually
from headrace_shared.testing.simulated_provider import SimulatedProvider
from headrace_shared.testing.spending import flush
from headrace_workers.breaker import Breakers
from headrace_workers.configured import Configured
from headrace_workers.retry_budget import RetryBudget
from headrace_workers.testing import running_worker

NOWHERE = "redis://127.0.0.1:1"
PROVIDER = "openai"
FLOOR = 10
TARGET = Target(PROVIDER, MODEL)
_COUNTED = script("""
local sum, fields = 0, redis.call('HGETALL', KEYS[1])
for i = 1, #fields, 2 do
    if string.find(fields[i], '^ok:') then sum = sum + tonumber(fields[i + 1]) end
end
return sum
""")
_RING = script("return redis.call('RPUSH', KEYS[1], '1')")

Process = Callable[[], "Member"]


class Member:
    """A process of the fleet: its budget, and the breakers that tell the fleet of its successes."""

    def __init__(self, redis: Redis, configured: Configured) -> None:
        self.budget = RetryBudget(redis, configured)
        self.breakers = Breakers(Dispatch(redis), configured, self.budget.unshared)

    async def succeed(self, times: int) -> None:
        for _ in range(times):
            self.budget.succeeded(PROVIDER)
        await self.breakers.of(TARGET).share()

    async def retry(self, times: int, provider: str = PROVIDER) -> tuple[int, list[timedelta]]:
        """Ask for so many retries; return how many may go, and how long the others wait."""
        waits = await asyncio.gather(*(self.budget.wait_of(provider) for _ in range(times)))
        refused = sorted(wait for wait in waits if wait is not None)
        return times - len(refused), refused


@pytest.fixture
def process(redis: Redis, pool: Pool) -> Process:
    configuration = Configuration.from_document({"retries": {"budget": 0.1, "floor": FLOOR}})
    return lambda: Member(redis, Configured(pool, Versioned(0, configuration)))


@pytest.fixture
async def away(pool: Pool) -> AsyncIterator[Member]:
    redis = Redis(NOWHERE)
    yield Member(redis, Configured(pool, Versioned(0, Configuration.default())))
    await redis.close()


async def test_a_tenth_of_the_fleets_successes_may_be_retries(process: Process) -> None:
    one, two = process(), process()
    await one.succeed(150)
    await two.succeed(150)
    assert (await one.retry(20))[0] == 20
    assert (await two.retry(20))[0] == 10
    assert (await one.retry(1))[0] == 0


async def test_a_few_are_always_allowed_and_then_it_is_one_after_the_other(process: Process) -> None:
    one, two = process(), process()
    assert (await one.retry(6))[0] == 6
    granted, waits = await two.retry(64)
    assert granted == FLOOR - 6
    assert len(waits) == 60
    assert waits[0] >= timedelta(seconds=1)
    assert timedelta(seconds=30) <= waits[-1] <= timedelta(seconds=36)


async def test_how_many_are_always_allowed_is_the_operators(redis: Redis, pool: Pool) -> None:
    configured = Configured(pool, Versioned(0, Configuration.from_document({"retries": {"floor": 3}})))
    assert (await Member(redis, configured).retry(5))[0] == 3
    nowhere = Redis(NOWHERE)
    assert (await Member(nowhere, configured).retry(5))[0] == 3
    await nowhere.close()


async def test_those_that_are_refused_together_wait_in_their_order(process: Process) -> None:
    one = process()
    await one.retry(FLOOR)
    waits = await asyncio.gather(*(one.budget.wait_of(PROVIDER) for _ in range(12)))
    assert waits[0] is not None
    assert waits[-1] is not None
    assert waits[-1] > 2 * waits[0]


async def test_many_that_are_refused_do_not_come_back_together(process: Process) -> None:
    """Seven hundred within some seconds would take the turns of everybody else."""
    one = process()
    _, waits = await one.retry(700)
    most = max(sum(later <= wait < later + timedelta(seconds=10) for wait in waits) for later in waits[150:])
    assert most < 70
    assert waits[-1] < timedelta(minutes=6)


async def test_providers_have_budgets_of_their_own(process: Process) -> None:
    one = process()
    assert (await one.retry(20))[0] == 10
    assert (await one.retry(20, "other"))[0] == 10


async def test_what_was_counted_falls_out_of_the_window(process: Process, clock: Clock) -> None:
    one = process()
    await one.succeed(500)
    assert (await one.retry(100))[0] == 50
    await clock.advance(retries.WINDOW + timedelta(seconds=1))
    assert (await one.retry(100))[0] == 10


async def test_successes_are_told_once(process: Process, redis: Redis) -> None:
    one = process()
    await one.succeed(200)
    await one.succeed(0)
    assert (await retries.ask(redis, PROVIDER, 100, share=0.1, floor=FLOOR)).granted == 20


async def test_a_lost_count_is_the_floor(process: Process, redis: Redis) -> None:
    one = process()
    await one.succeed(500)
    await flush(redis)
    assert (await one.retry(100))[0] == 10


async def test_without_redis_each_process_keeps_to_the_floor(away: Member) -> None:
    assert (await away.retry(6))[0] == 6
    granted, waits = await away.retry(10)
    assert granted == 4
    assert min(waits) >= timedelta(seconds=1)


@pytest.fixture
def jobs(pool: Pool, dispatch: Dispatch) -> Jobs:
    return Jobs(pool, dispatch)


@pytest.mark.usefixtures("environment", "provider")
async def test_a_worker_tells_of_its_successes(jobs: Jobs, redis: Redis) -> None:
    ids = await jobs.add(30)
    async with running_worker():
        await jobs.ended(ids)
        await eventually(lambda: counted(redis), lambda count: count == 30)


@pytest.mark.usefixtures("environment")
async def test_a_retry_beyond_the_budget_waits_and_loses_no_attempt(
    jobs: Jobs, provider: SimulatedProvider, clock: Clock
) -> None:
    provider.behave(Behaviour(rate_limited=1))
    await jobs.configure({"retries": {"initial": "1ms", "maximum": "1ms"}})
    ids = await jobs.add(40, max_attempts=2)
    async with running_worker(concurrency=40, lease_seconds=3600):
        # Ten have their second and last attempt; nobody fails of the budget.
        standing = await eventually(lambda: standings(jobs), lambda found: found.total() == 40)
        assert standing == {("failed", 2, None): 10, ("queued", 1, WaitReason.RETRY): 30}
        assert provider.books.total.requests == 50
        provider.behave(Behaviour())
        await passing(clock, jobs, ids)
    assert await standings(jobs) == {("failed", 2, None): 10, ("succeeded", 1, None): 30}


@pytest.mark.usefixtures("environment")
async def test_an_outage_does_not_become_a_storm(
    jobs: Jobs, provider: SimulatedProvider, clock: Clock, redis: Redis
) -> None:
    """Two and a half minutes of it are twelve cooldowns, each a little longer than the longest there is."""
    await jobs.configure(
        {
            "retries": {"initial": "1ms", "maximum": "5ms"},
            "breaker": {"minimum_calls": 5, "cooldown": "10s", "probe_lease": "10s"},
        }
    )
    provider.behave(Behaviour(outage=True))
    ids = await jobs.add(400)
    books, cooldowns = provider.books, 12
    async with running_worker(concurrency=4, **LONG), running_worker(concurrency=4, **LONG):
        await eventually(lambda: breakers.view(redis, TARGET), lambda view: view.is_open)
        # A call that was admitted before it opened goes out after it.
        await eventually(lambda: under_way(jobs), lambda count: count == 0)
        before = books.total.requests
        for probes in range(before + 1, before + 1 + cooldowns):
            await pass_time(clock, jobs, timedelta(seconds=13))
            await asked(books, probes)
            await eventually(lambda: breakers.view(redis, TARGET), lambda view: view.reopens_in > NONE)
        assert books.total.requests == before + cooldowns, "one probe a cooldown, over both processes"
        provider.behave(Behaviour())
        await passing(clock, jobs, ids)
    assert {state for state, _, _ in await standings(jobs)} == {"succeeded"}
    assert books.total.requests <= 1.1 * len(ids)


LONG = {"lease_seconds": 3600}
NONE = timedelta(0)


async def counted(redis: Redis) -> int:
    """Return the successes that the fleet knows of."""
    values = await redis.evaluate(_COUNTED, [keys.retries(PROVIDER)])
    return values if isinstance(values, int) else 0


async def pass_time(clock: Clock, jobs: Jobs, duration: timedelta) -> None:
    """Let time pass, and workers see it that wait for work by a clock of their own."""
    await clock.advance(duration)
    await jobs.dispatch.redis.evaluate(_RING, [keys.bell(LANE)])
    await jobs.dispatch.redis.evaluate(_RING, [keys.bell(LANE)])


async def asked(books: Books, requests: int) -> None:
    await books.until(lambda: books.total.requests >= requests)


async def passing(clock: Clock, jobs: Jobs, ids: Sequence[JobId]) -> None:
    """Let time pass until jobs have ended."""

    async def left() -> int:
        await pass_time(clock, jobs, timedelta(seconds=1))
        return int(await jobs.pool.fetchval("SELECT count(*) FROM headrace.jobs WHERE ended_at IS NULL"))

    await eventually(left, lambda count: count == 0, within=timedelta(minutes=2))
    await jobs.ended(ids)


async def under_way(jobs: Jobs) -> int:
    return int(await jobs.pool.fetchval("SELECT count(*) FROM headrace.jobs WHERE state = 'running'"))


async def standings(jobs: Jobs) -> Counter[tuple[str, int, str | None]]:
    """Count the jobs that nobody works at, by state, attempts and what they wait for."""
    rows = await jobs.pool.fetch(
        "SELECT state, attempts, waiting_for FROM headrace.jobs"
        " WHERE ended_at IS NOT NULL OR waiting_for IS NOT NULL"
    )
    return Counter((row["state"], row["attempts"], row["waiting_for"]) for row in rows)
