"""What grows without an end: found by an index where it is looked for, deleted where nobody needs it."""

import re
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest

from headrace_shared.budgets import Budgets
from headrace_shared.money import NanoUSD
from headrace_shared.store import alerts, money
from headrace_shared.store.money import BudgetPolicy, WindowKind
from headrace_shared.store.pool import Connection, Pool
from headrace_shared.store.sql import Statements
from headrace_shared.testing.clock import Clock
from headrace_shared.testing.spending import Spender
from headrace_workers.alerts import Refusals
from headrace_workers.reaper import Reaper

DAY = timedelta(days=1)
MONTH = 30 * DAY
QUEUED = """
INSERT INTO headrace.jobs
    (id, tenant, lane, route, max_attempts, run_at, created_at, endpoint, body, waiting_for)
SELECT (substr(headrace.id_floor(now.now)::text, 1, 24) || lpad(n::text, 12, '0'))::uuid, 'acme', 'default',
       'gpt-4o-mini', 6, now.now + interval '1 hour', now.now, '/v1/chat/completions', '{}',
       CASE WHEN n % 1000 = 0 THEN 'budget' WHEN n % 2 = 0 THEN 'limit' END
FROM headrace.now() AS now(now), generate_series(1, 10000) AS n
"""


async def passed_over(connection: Connection, arguments: str) -> int:
    """Run the statement `p`, and return how many rows it read and did not want."""
    lines = await connection.fetch(f"EXPLAIN (ANALYZE) EXECUTE p({arguments})")
    plan = "\n".join(line[0] for line in lines)
    return sum(int(count) for count in re.findall(r"Rows Removed by Filter: (\d+)", plan))


@pytest.mark.parametrize("looked", ["SELECT 1", "ANALYZE headrace.jobs; DISCARD PLANS"])
async def test_those_that_wait_for_a_budget_are_found_among_many_that_do_not(pool: Pool, looked: str) -> None:
    async with pool.acquire() as connection:
        await connection.execute(f"PREPARE p (text, int) AS {Statements('money.sql')['wake_waiters']}")
        # Planned while the tables are empty, as the statements of a connection are that lives long.
        await passed_over(connection, "'global', 1000")
        await connection.execute(QUEUED)
        await connection.execute(looked)
        assert await passed_over(connection, "'tenant:acme', 1000") == 0
        due = "SELECT count(*) FROM headrace.jobs WHERE run_at <= headrace.now() AND waiting_for IS NULL"
        assert await connection.fetchval(due) == 10
        await connection.execute("DEALLOCATE p")


@pytest.fixture
async def spender(pool: Pool, clock: Clock) -> Spender:
    """At noon of the tenth of next month."""
    now = datetime.now(UTC)
    tenth = (now.replace(day=1) + 32 * DAY).replace(day=10, hour=12, minute=0, second=0, microsecond=0)
    await clock.advance(tenth - now)
    return await Spender.start(pool)


async def booked(pool: Pool) -> set[str]:
    rows = await pool.fetch(
        "SELECT DISTINCT split_part(window_name, ':', 1) AS kind, scope FROM headrace.spend"
    )
    return {f"{row['scope']} {row['kind']}" for row in rows}


async def test_sums_of_windows_that_no_budget_can_need_are_deleted_and_those_in_total_stay(
    spender: Spender, pool: Pool, budgets: Budgets, reaper: Reaper, clock: Clock
) -> None:
    await spender.conclude(await spender.open(budgets, 10, "global", "tenant:acme"), cost=7)
    every = {f"{scope} {kind}" for scope in ("global", "tenant:acme") for kind in ("day", "month", "total")}
    await clock.advance(70 * DAY)
    await money.forget_spend(pool, older_than=MONTH)
    assert await booked(pool) == every
    await clock.advance(DAY)
    await money.forget_spend(pool, older_than=MONTH)
    assert await booked(pool) == {one for one in every if "day" not in one}
    await clock.advance(MONTH)
    await spender.conclude(await spender.open(budgets, 10, "global"), cost=1)
    await reaper.turn()
    assert await booked(pool) == {"tenant:acme total", "global day", "global month", "global total"}
    await budgets.set("global", WindowKind.TOTAL, NanoUSD(100), BudgetPolicy.WAIT)
    assert [state.settled for state in await money.budget_state(pool)] == [8]


async def test_however_many_sums_are_old_all_of_them_go(pool: Pool) -> None:
    await pool.execute(
        "INSERT INTO headrace.spend (scope, window_name, shard)"
        " SELECT 'tag:' || n, 'day:2020-01-01', 0 FROM generate_series(1, 20001) AS n"
    )
    await money.forget_spend(pool, older_than=MONTH)
    assert await booked(pool) == set()


@pytest.mark.parametrize(
    ("name", "types", "arguments"),
    [("forget_windows", "int, int", "70, 1000"), ("forget_batches", "int", "1000")],
)
async def test_old_sums_are_found_among_many_that_stay(
    pool: Pool, name: str, types: str, arguments: str
) -> None:
    async with pool.acquire() as connection:
        await connection.execute(f"PREPARE p ({types}) AS {Statements('money.sql')[name]}")
        await passed_over(connection, arguments)
        await connection.execute(
            "INSERT INTO headrace.spend (scope, window_name, shard) SELECT 'tag:' || n, name, 0"
            " FROM generate_series(1, 1000) AS n, unnest(headrace.windows(headrace.now())) AS name"
        )
        assert await passed_over(connection, arguments) == 0
        await connection.execute("DEALLOCATE p")


async def test_sums_of_a_batch_go_when_no_job_of_it_is_left_and_no_budget(
    spender: Spender, pool: Pool, budgets: Budgets
) -> None:
    present, limited, gone = (f"batch:{uuid4()}" for _ in range(3))
    await pool.execute("UPDATE headrace.jobs SET batch_id = $1, line = 1", present.removeprefix("batch:"))
    await budgets.set(limited, WindowKind.TOTAL, NanoUSD(100), BudgetPolicy.WAIT)
    await spender.conclude(await spender.open(budgets, 10, present, limited, gone, "tag:batch:x"), cost=7)
    await money.forget_spend(pool, older_than=MONTH)
    scopes = {one.partition(" ")[0] for one in await booked(pool)}
    assert scopes == {present, limited, "tag:batch:x"}


async def test_a_refusal_in_total_is_forgotten_when_its_budget_is_gone(
    spender: Spender, pool: Pool, budgets: Budgets
) -> None:
    for scope in ("global", "tenant:acme"):
        await budgets.set(scope, WindowKind.TOTAL, NanoUSD(1), BudgetPolicy.WAIT)
        await Refusals(pool).note(await spender.refused(budgets, 9, scope))
    await money.remove_budget(pool, "global", WindowKind.TOTAL)
    await alerts.forget_alerts(pool, older_than=MONTH)
    left = await pool.fetch("SELECT scope FROM headrace.budget_refusals")
    assert [row["scope"] for row in left] == ["tenant:acme"]
