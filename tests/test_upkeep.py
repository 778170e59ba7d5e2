"""What grows without an end: found by an index where it is looked for, deleted where nobody needs it."""

import re

import pytest

from headrace_shared.store.pool import Connection, Pool
from headrace_shared.store.sql import Statements

QUEUED = """
INSERT INTO headrace.jobs
    (id, tenant, lane, route, max_attempts, run_at, created_at, endpoint, body, waiting_for)
SELECT (substr(headrace.id_floor(now.now)::text, 1, 24) || lpad(n::text, 12, '0'))::uuid, 'acme', 'default',
       'gpt-4o-mini', 6, now.now + interval '1 hour', now.now, '/v1/chat/completions', '{}',
       CASE WHEN n % 1000 = 0 THEN 'budget' WHEN n % 2 = 0 THEN 'limit' END
FROM headrace.now() AS now(now), generate_series(1, 10000) AS n
"""


async def passed_over(connection: Connection, scope: str) -> int:
    """Run the statement `p`, and return how many rows it read and did not want."""
    lines = await connection.fetch(f"EXPLAIN (ANALYZE) EXECUTE p('{scope}', 1000)")
    plan = "\n".join(line[0] for line in lines)
    return sum(int(count) for count in re.findall(r"Rows Removed by Filter: (\d+)", plan))


@pytest.mark.parametrize("looked", ["SELECT 1", "ANALYZE headrace.jobs; DISCARD PLANS"])
async def test_those_that_wait_for_a_budget_are_found_among_many_that_do_not(pool: Pool, looked: str) -> None:
    async with pool.acquire() as connection:
        await connection.execute(f"PREPARE p (text, int) AS {Statements('money.sql')['wake_waiters']}")
        # Planned while the tables are empty, as the statements of a connection are that lives long.
        await passed_over(connection, "global")
        await connection.execute(QUEUED)
        await connection.execute(looked)
        assert await passed_over(connection, "tenant:acme") == 0
        due = "SELECT count(*) FROM headrace.jobs WHERE run_at <= headrace.now() AND waiting_for IS NULL"
        assert await connection.fetchval(due) == 10
        await connection.execute("DEALLOCATE p")
