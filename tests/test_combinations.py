"""Limits, caps, budgets, breakers, pauses and fairness together: nothing stalls, and nothing leaks."""

from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import pytest
from combination import (
    CAPS,
    CONCURRENT,
    LANES,
    LOWERED,
    MOST,
    ROUTES,
    TENANTS,
    WAITS_FOR_TOMORROW,
    Fleet,
    fleet,
    schedule,
)
from command_line import Command

from headrace_producer import JobRequest
from headrace_shared.budgets import Budgets
from headrace_shared.dispatch.connection import Redis
from headrace_shared.dispatch.dispatch import Dispatch
from headrace_shared.outcome import ErrorClass
from headrace_shared.store import configurations
from headrace_shared.store.money import BudgetPolicy
from headrace_shared.store.pool import Pool
from headrace_shared.testing.bill import bill
from headrace_shared.testing.clock import Clock, script
from headrace_shared.testing.jobs import Jobs, eventually

pytestmark = pytest.mark.usefixtures("environment")

A_DAY = timedelta(days=1)
A_STALL = timedelta(seconds=15)
"""In which nothing moves: less than what a job waits at last that nobody told to go on."""

OVER = script("""
local over, said, settings = {}, {}, redis.call('HGETALL', 'headrace:money')
for i = 1, #settings, 2 do said[settings[i]] = settings[i + 1] end
for field, limit in pairs(said) do
    local scope, kind = string.match(field, '^limit|(.*)|(%a+)$')
    if scope and said['policy|' .. scope .. '|' .. kind] ~= 'soft' then
        local sum = 0
        for _, part in ipairs({'settled', 'suspense', 'held'}) do
            local counter = scope .. '|' .. said['window|' .. kind] .. '|' .. part
            sum = sum + tonumber(redis.call('HGET', 'headrace:spent', counter) or '0')
        end
        if sum > tonumber(limit) then over[#over + 1] = scope .. ' ' .. kind end
    end
end
for i = 1, #ARGV, 2 do
    local running = redis.call('ZCARD', 'headrace:running:tenant:' .. ARGV[i])
    if running > tonumber(ARGV[i + 1]) then over[#over + 1] = ARGV[i] .. ' runs ' .. running end
end
return over
""")
LEFT = script("""
local left, open = {}, {}
for _, key in ipairs(redis.call('KEYS', 'headrace:breaker:*')) do
    open[#open + 1] = redis.call('HGET', key, 'state') or nil
end
local function note(key, members)
    for _, member in ipairs(members) do left[#left + 1] = key .. ' ' .. member end
end
for _, key in ipairs(redis.call('KEYS', 'headrace:*')) do
    local kind = string.match(key, '^headrace:([%a-]+)')
    if kind == 'queue' or kind == 'permits' or kind == 'running' or kind == 'hold-leases' then
        note(key, redis.call('ZRANGE', key, 0, -1))
    elseif kind == 'full' then
        note(key, redis.call('SMEMBERS', key))
    elseif kind == 'holds' or kind == 'gates' or kind == 'spent' then
        local fields = redis.call('HGETALL', key)
        for i = 1, #fields, 2 do
            local leaks = kind == 'holds' and fields[i] ~= 'epoch' or kind == 'gates' and fields[i + 1] == '0'
                or kind == 'gates' and #open == 0 and string.match(fields[i], '|breaker$')
                or kind == 'spent' and string.match(fields[i], '|held$') and fields[i + 1] ~= '0'
            if leaks then note(key, {fields[i]}) end
        end
    end
end
return left
""")
STILL = """
SELECT count(*) FILTER (WHERE ended_at IS NOT NULL)::int AS ended,
       count(*) FILTER (WHERE ended_at IS NULL AND (state = 'running' OR NOT $1 = ANY(tags)
           OR waiting_for IS DISTINCT FROM 'budget' OR run_at < headrace.now() + interval '1 minute')
       )::int AS going,
       count(*) FILTER (WHERE ended_at IS NULL)::int AS open
FROM headrace.jobs
"""
LEFT_IN_THE_STORE = """
SELECT 'call ' || job_id FROM headrace.calls WHERE state = 'open'
UNION ALL SELECT 'flight of ' || leader FROM headrace.flights
UNION ALL SELECT 'twice ' || job_id FROM headrace.calls WHERE state = 'answered' AND error_class IS NULL
          GROUP BY job_id HAVING count(*) > 1
UNION ALL SELECT 'twice ' || job_id FROM headrace.attempts WHERE outcome = 'succeeded'
          GROUP BY job_id HAVING count(*) > 1
"""
MOST_AT_A_TIME = """
SELECT j.tenant, max((
    SELECT count(DISTINCT o.job_id) FROM headrace.calls o JOIN headrace.jobs k ON k.id = o.job_id
    WHERE k.tenant = j.tenant AND c.opened_at >= o.opened_at AND c.opened_at < o.ended_at))::int AS most
FROM headrace.calls c JOIN headrace.jobs j ON j.id = c.job_id GROUP BY j.tenant
"""


@pytest.fixture
def jobs(pool: Pool, dispatch: Dispatch) -> Jobs:
    return Jobs(pool, dispatch)


@dataclass(frozen=True, slots=True)
class Standing:
    """How many jobs have ended, go on today, and are open."""

    ended: int
    going: int
    open: int


async def standing(jobs: Jobs) -> Standing:
    row = await jobs.pool.fetchrow(STILL, WAITS_FOR_TOMORROW)
    assert row is not None
    return Standing(row["ended"], row["going"], row["open"])


async def moved(jobs: Jobs, since: Standing) -> Standing:
    """Wait until something is not as it was; a stall is a time in which nothing moves."""
    return await eventually(lambda: standing(jobs), lambda now: now != since, within=A_STALL)


async def until_all_rest(jobs: Jobs) -> Standing:
    """Wait until what is left waits for tomorrow."""
    now = await standing(jobs)
    while now.going:
        now = await moved(jobs, now)
    return now


async def turn_days(jobs: Jobs, clock: Clock) -> None:
    """Let days go by until all jobs have ended, each of them some."""
    before = await until_all_rest(jobs)
    while before.open:
        await clock.advance(A_DAY)
        await moved(jobs, before)
        now = await until_all_rest(jobs)
        assert now.ended > before.ended
        before = now


async def over(redis: Redis) -> list[str]:
    """What is beyond its limit at this moment: budgets, and tenants."""
    limits = [part for cap in CAPS.items() for part in cap]
    found = names(await redis.evaluate(OVER, (), limits))
    return [name for name in found if not name.startswith(LOWERED)]


def names(reply: object) -> list[str]:
    return [name.decode() for name in cast("list[bytes]", reply)]


async def left(pool: Pool, redis: Redis) -> list[str]:
    """What is there although all jobs have ended."""
    rows = await pool.fetch(LEFT_IN_THE_STORE)
    return [*(row[0] for row in rows), *names(await redis.evaluate(LEFT))]


async def check_the_books(made: Fleet) -> None:
    """What was spent is what was booked, keeps every hard limit, and covers what the providers say."""
    spend = await made.jobs.spend()
    assert spend == await made.jobs.ledger()
    for view in await made.budgets.view():
        state = view.state
        if state.policy is not BudgetPolicy.SOFT:
            spent = [
                sum(sums)
                for (scope, window), sums in spend.items()
                if scope == state.scope and window.startswith(state.kind)
            ]
            assert all(one <= state.limit for one in spent), state
    configuration = (await configurations.current(made.jobs.pool)).configuration
    for name, provider in made.providers.items():
        row = await made.jobs.pool.fetchrow(
            "SELECT coalesce(sum(cost_nano), 0)::bigint AS cost,"
            " coalesce(sum(suspense_nano), 0)::bigint AS suspense"
            " FROM headrace.calls WHERE provider = $1",
            name,
        )
        assert row is not None
        requests = provider.books.requests
        assert row["cost"] <= bill(configuration, name, [one for one in requests if one.answered])
        assert row["cost"] + row["suspense"] >= bill(configuration, name, requests)


async def check_endings(made: Fleet) -> None:
    rows = await made.jobs.pool.fetch("SELECT DISTINCT state, error_class FROM headrace.jobs")
    failed = {row["error_class"] for row in rows if row["state"] != "succeeded"}
    assert failed <= {ErrorClass.BUDGET_EXHAUSTED, ErrorClass.CANCELLED}
    found = {row["tenant"]: row["most"] for row in await made.jobs.pool.fetch(MOST_AT_A_TIME)}
    assert all(found[tenant] <= most for tenant, most in CAPS.items()), found
    # A provider may not know yet that nobody waits for an answer any more.
    left_alone = await made.jobs.pool.fetchval(
        "SELECT count(*) FROM headrace.calls WHERE error_class = 'cancelled'"
    )
    for name, most in CONCURRENT.items():
        assert made.providers[name].books.max_concurrent <= most + left_alone


async def one_of_each(made: Fleet) -> None:
    """Whatever was closed, parked or full, no queue is left behind: each takes one more job to an end."""
    requests = [
        JobRequest(
            "/v1/chat/completions",
            {
                "model": route,
                "max_completion_tokens": MOST,
                "messages": [{"role": "user", "content": f"{lane} {route} {tenant}"}],
            },
            tenant=tenant,
            lane=lane,
        )
        for lane in LANES
        for route in dict.fromkeys(ROUTES)
        for tenant in TENANTS
    ]
    await made.client.enqueue_many(requests)
    await until_all_rest(made.jobs)


def test_a_seed_is_a_schedule() -> None:
    assert schedule(1) == schedule(1) != schedule(2)


@pytest.mark.parametrize("seed", range(3))
async def test_everything_at_once_comes_to_an_end_and_leaves_nothing_behind(
    seed: int, jobs: Jobs, budgets: Budgets, clock: Clock, command: Command
) -> None:
    async with fleet(seed, jobs, budgets, command) as made:
        for step in schedule(seed):
            await made.act(step)
            await made.some_calls()
            assert await over(jobs.dispatch.redis) == []
        await turn_days(jobs, clock)
        await one_of_each(made)
        await eventually(lambda: left(jobs.pool, jobs.dispatch.redis), lambda found: not found)
    await check_the_books(made)
    await check_endings(made)
