"""A pooler in transaction mode between the processes and PostgreSQL changes nothing for a job."""

import asyncio
import os
import signal

import pytest
from worker_processes import worker

from headrace_producer import Headrace, JobRequest
from headrace_shared.dispatch.dispatch import Dispatch
from headrace_shared.store.pool import Pool
from headrace_shared.testing.jobs import Jobs, eventually
from headrace_shared.testing.simulated_provider import SimulatedProvider

pytestmark = pytest.mark.conformance

CHAT = "/v1/chat/completions"
_STATES = "SELECT count(*) FROM headrace.jobs WHERE state = 'running'"
_SLEEPING = (
    "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query = 'SELECT pg_sleep(600)'"
    " AND datname = current_database()"
)


@pytest.fixture
def jobs(pool: Pool, dispatch: Dispatch) -> Jobs:
    return Jobs(pool, dispatch)


def request(number: int) -> JobRequest:
    return JobRequest(
        CHAT, {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": f"What is {number}?"}]}
    )


@pytest.mark.skipif(
    "HEADRACE_TEST_POOLER_URL" not in os.environ, reason="HEADRACE_TEST_POOLER_URL names no PgBouncer"
)
async def test_jobs_are_run_through_a_pooler(
    headrace: Headrace, jobs: Jobs, provider: SimulatedProvider, postgres_url: str, direct_url: str
) -> None:
    """From the client to workers in processes of their own, of which one is killed, and back."""
    assert postgres_url != direct_url
    handles = await headrace.enqueue_many([request(number) for number in range(60)])
    async with worker(concurrency=4) as victim, worker():
        await eventually(lambda: jobs.pool.fetchval(_STATES), lambda running: running >= 4)
        victim.send_signal(signal.SIGKILL)
        results = await asyncio.gather(*(handle.result() for handle in handles))
    assert len({result.job_id for result in results}) == 60
    assert all(result.body for result in results)
    answered = await jobs.pool.fetchval("SELECT count(*) FROM headrace.calls WHERE state = 'answered'")
    assert answered == 60
    assert await jobs.spend() == await jobs.ledger()


async def test_a_statement_that_is_given_up_is_ended_at_the_server(pool: Pool) -> None:
    sleeping = asyncio.create_task(pool.fetch("SELECT pg_sleep(600)"))
    await eventually(lambda: pool.fetchval(_SLEEPING), lambda found: found == 1)
    sleeping.cancel()
    await asyncio.gather(sleeping, return_exceptions=True)
    await eventually(lambda: pool.fetchval(_SLEEPING), lambda found: found == 0)
