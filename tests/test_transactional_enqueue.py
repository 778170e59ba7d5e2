"""A job that is enqueued on the caller's own connection is saved exactly when its transaction is."""

import asyncio
import json
from typing import Literal

import asyncpg
import pytest

from headrace_producer import Headrace, JobRequest
from headrace_shared.configuration import parse_toml
from headrace_shared.dispatch.connection import Redis
from headrace_shared.errors import IdempotencyConflict, InvalidRequest, JobNotFound
from headrace_shared.store import configurations
from headrace_shared.store.pool import Pool
from headrace_shared.testing.clock import script

pytestmark = pytest.mark.conformance

CHAT = "/v1/chat/completions"
BODY = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello"}]}


async def test_a_commit_saves_it_and_wakes_the_feeder(
    headrace: Headrace, pool: Pool, redis: Redis, direct_url: str
) -> None:
    heard: asyncio.Queue[str] = asyncio.Queue()
    listener = await asyncpg.connect(direct_url)

    def hear(*_: object) -> None:
        heard.put_nowait("bell")

    await listener.add_listener("headrace", hear)
    async with pool.acquire() as connection, connection.transaction():
        job = await headrace.enqueue(CHAT, BODY, connection=connection)
        with pytest.raises(JobNotFound):
            await job.get()
        assert heard.empty()
    assert (await job.get()).state == "queued"
    assert await asyncio.wait_for(heard.get(), 10) == "bell"
    assert await redis.evaluate(script("return redis.call('DBSIZE')")) == 0
    await listener.close()


async def test_a_rollback_leaves_nothing(headrace: Headrace, pool: Pool) -> None:
    async def order_and_fail() -> None:
        async with pool.acquire() as connection, connection.transaction():
            await connection.execute("CREATE TABLE orders ()")
            await headrace.enqueue(CHAT, BODY, idempotency_key="order-17", connection=connection)
            await headrace.enqueue_many([JobRequest(CHAT, BODY)] * 3, connection=connection)
            raise KeyError

    with pytest.raises(KeyError):
        await order_and_fail()
    assert (await headrace.list()).jobs == []
    assert not (await headrace.enqueue(CHAT, BODY, idempotency_key="order-17")).existed


async def test_a_refusal_leaves_the_callers_transaction_usable(headrace: Headrace, pool: Pool) -> None:
    await headrace.enqueue(CHAT, BODY, idempotency_key="taken")
    async with pool.acquire() as connection, connection.transaction():
        first = await headrace.enqueue(CHAT, BODY, connection=connection)
        with pytest.raises(InvalidRequest):
            await headrace.enqueue(CHAT, BODY, lane="night", connection=connection)
        other = {**BODY, "user": "other"}
        with pytest.raises(IdempotencyConflict):
            await headrace.enqueue_many(
                [JobRequest(CHAT, BODY), JobRequest(CHAT, other, idempotency_key="taken")],
                connection=connection,
            )
    saved = {job.id for job in (await headrace.list()).jobs}
    assert len(saved) == 2
    assert first.id in saved


@pytest.mark.parametrize("isolation", ["read_committed", "repeatable_read", "serializable"])
async def test_what_the_transaction_sees_is_what_counts(
    headrace: Headrace, pool: Pool, isolation: Literal["read_committed", "repeatable_read", "serializable"]
) -> None:
    await headrace.enqueue(CHAT, BODY)
    async with pool.acquire() as connection:
        # As applications often do: their connections decode jsonb by themselves.
        await connection.set_type_codec("jsonb", schema="pg_catalog", encoder=json.dumps, decoder=json.loads)
        async with connection.transaction(isolation=isolation):
            await connection.execute("SELECT FROM headrace.jobs")
            await configurations.apply(pool, parse_toml("[retries]\nmax_attempts = 2", "test"), "test")
            await headrace.enqueue(CHAT, BODY)
            job = await headrace.enqueue(CHAT, BODY, connection=connection)
        await connection.reset_type_codec("jsonb", schema="pg_catalog")
    assert (await job.get()).max_attempts == (2 if isolation == "read_committed" else 6)


async def test_without_a_transaction_it_is_saved_at_once(headrace: Headrace, pool: Pool) -> None:
    async with pool.acquire() as connection:
        job = await headrace.enqueue(CHAT, BODY, connection=connection)
        assert (await job.get()).state == "queued"
