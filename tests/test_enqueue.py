"""What `enqueue` accepts is saved once and found by workers."""

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest

from headrace_producer import Headrace, JobRequest, JobState
from headrace_shared.configuration import parse_toml
from headrace_shared.dispatch.dispatch import Dispatch
from headrace_shared.errors import IdempotencyConflict, InvalidRequest
from headrace_shared.ids import Lane
from headrace_shared.store import configurations
from headrace_shared.store.pool import Pool
from headrace_shared.testing.clock import Clock

pytestmark = pytest.mark.conformance

CHAT = "/v1/chat/completions"
LANES = {Lane("interactive"): 1, Lane("default"): 1, Lane("batch"): 1}
MINUTE = timedelta(minutes=1)


def chat(text: str = "Hello") -> dict[str, object]:
    return {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": text}]}


async def count(pool: Pool) -> int:
    return int(await pool.fetchval("SELECT count(*) FROM headrace.jobs"))


async def test_a_job_is_saved_as_it_was_asked_for(headrace: Headrace, pool: Pool) -> None:
    body = b'{ "model": "gpt-4o-mini", "messages": [{"role":"user","content":"caf\xc3\xa9"}] }'
    handle = await headrace.enqueue(
        CHAT,
        body,
        tenant="acme",
        lane="interactive",
        webhook="https://example.com/hook",
        metadata={"order": "17", "note": ""},
        delay=MINUTE,
        max_attempts=3,
    )
    assert not handle.existed
    job = await handle.get()
    assert (job.id, job.tenant, job.lane, job.route) == (handle.id, "acme", "interactive", "gpt-4o-mini")
    assert (job.state, job.attempts, job.max_attempts) == (JobState.QUEUED, 0, 3)
    assert job.run_at - job.created_at == MINUTE
    assert (job.webhook, job.metadata) == ("https://example.com/hook", {"order": "17", "note": ""})
    assert await pool.fetchval("SELECT body FROM headrace.jobs") == body


async def test_defaults_are_the_clients_and_the_configurations(environment: None, pool: Pool) -> None:
    text = '[retries]\nmax_attempts = 2\n[defaults]\nlane = "batch"\n[routes.fast]\n'
    text += 'targets = [{provider = "openai", model = "gpt-4o-mini"}]'
    await configurations.apply(pool, parse_toml(text, "test"), "test")
    async with Headrace(tenant="acme") as headrace:
        job = await (await headrace.enqueue(CHAT, {**chat(), "model": "fast"})).get()
    assert (job.tenant, job.lane, job.max_attempts, job.route) == ("acme", "batch", 2, "fast")


async def test_workers_find_it_at_once(headrace: Headrace, dispatch: Dispatch) -> None:
    waiting = asyncio.create_task(dispatch.wait_for_jobs([Lane("default")], MINUTE))
    handle = await headrace.enqueue(CHAT, chat())
    assert await waiting
    claim = await dispatch.claim(10, LANES, MINUTE, MINUTE)
    assert [entry.id for entry in claim.entries] == [handle.id]


async def test_a_delayed_job_is_not_due_before_its_time(
    headrace: Headrace, dispatch: Dispatch, clock: Clock
) -> None:
    handle = await headrace.enqueue(CHAT, chat(), delay=timedelta(hours=1))
    assert (await dispatch.claim(10, LANES, MINUTE, MINUTE)).entries == []
    await clock.advance(timedelta(hours=1))
    assert [one.id for one in (await dispatch.claim(10, LANES, MINUTE, MINUTE)).entries] == [handle.id]


async def test_many_are_saved_in_order(headrace: Headrace, pool: Pool, dispatch: Dispatch) -> None:
    requests = [JobRequest(CHAT, chat(f"{number}"), tenant=f"t{number % 3}") for number in range(2500)]
    handles = await headrace.enqueue_many(requests)
    rows = await pool.fetch("SELECT id, tenant, body FROM headrace.jobs")
    saved = {row["id"]: (row["tenant"], json.loads(row["body"])) for row in rows}
    assert [saved[handle.id] for handle in handles] == [(each.tenant, each.body) for each in requests]
    claim = await dispatch.claim(3000, LANES, MINUTE, MINUTE)
    assert {entry.id for entry in claim.entries} == {handle.id for handle in handles}


async def test_none_of_many_is_no_job(headrace: Headrace, pool: Pool) -> None:
    assert await headrace.enqueue_many([]) == []
    assert await count(pool) == 0


async def test_many_may_come_one_by_one(headrace: Headrace, pool: Pool) -> None:
    async def requests() -> AsyncIterator[JobRequest]:
        for number in range(3):
            yield JobRequest(CHAT, chat(f"{number}"))

    assert len(await headrace.enqueue_many(requests())) == await count(pool) == 3


async def test_one_bad_request_refuses_all(headrace: Headrace, pool: Pool) -> None:
    requests = [JobRequest(CHAT, chat()) for _ in range(1500)]
    requests[1234] = JobRequest(CHAT, {"model": "gpt-4o-mini", "messages": []})
    with pytest.raises(InvalidRequest, match=r"^messages: ") as refused:
        await headrace.enqueue_many(requests)
    assert refused.value.__notes__ == ["This is about requests[1234]; none of the 1500 was enqueued."]
    assert await count(pool) == 0


async def test_the_same_key_and_body_are_the_same_job(headrace: Headrace, pool: Pool) -> None:
    first = await headrace.enqueue(CHAT, chat(), idempotency_key="order-17")
    again = await headrace.enqueue(CHAT, dict(reversed(chat().items())), idempotency_key="order-17")
    other = await headrace.enqueue(CHAT, chat(), idempotency_key="order-17", tenant="acme")
    assert (first.existed, again.existed, other.existed) == (False, True, False)
    assert again.id == first.id != other.id
    assert await count(pool) == 2


async def test_the_same_key_with_another_body_is_refused(headrace: Headrace, pool: Pool) -> None:
    first = await headrace.enqueue(CHAT, chat(), idempotency_key="order-17")
    with pytest.raises(IdempotencyConflict) as refused:
        await headrace.enqueue(CHAT, chat("Goodbye"), idempotency_key="order-17")
    assert (refused.value.key, refused.value.job_id) == ("order-17", first.id)
    fresh = JobRequest(CHAT, chat("Goodbye"), idempotency_key="order-18")
    with pytest.raises(IdempotencyConflict):
        await headrace.enqueue_many([fresh, JobRequest(CHAT, chat("Goodbye"), idempotency_key="order-17")])
    assert await count(pool) == 1
    assert not (await headrace.enqueue(CHAT, chat(), idempotency_key="order-18")).existed


async def test_a_key_may_repeat_within_one_call(headrace: Headrace, pool: Pool) -> None:
    request = JobRequest(CHAT, chat(), idempotency_key="once")
    handles = await headrace.enqueue_many([request] * 2100)
    assert len({handle.id for handle in handles}) == await count(pool) == 1
    assert sum(not handle.existed for handle in handles) == 1


async def test_fifty_at_once_with_one_key_are_one_job(headrace: Headrace, pool: Pool) -> None:
    handles = await asyncio.gather(
        *(headrace.enqueue(CHAT, chat(), idempotency_key="once") for _ in range(50))
    )
    assert len({handle.id for handle in handles}) == await count(pool) == 1
    assert sum(not handle.existed for handle in handles) == 1


async def test_keys_in_any_order_do_not_lock_each_other(headrace: Headrace, pool: Pool) -> None:
    requests = [JobRequest(CHAT, chat(), idempotency_key=f"key-{number}") for number in range(2500)]
    orders = [requests, requests[::-1], requests[1250:] + requests[:1250]]
    await asyncio.gather(*(headrace.enqueue_many(order) for order in orders))
    assert await count(pool) == 2500


async def test_an_expired_key_is_free_again(headrace: Headrace, clock: Clock) -> None:
    first = await headrace.enqueue(CHAT, chat(), idempotency_key="order-17")
    await clock.advance(timedelta(days=6))
    assert (await headrace.enqueue(CHAT, chat(), idempotency_key="order-17")).id == first.id
    await clock.advance(timedelta(days=2))
    other = await headrace.enqueue(CHAT, chat("Goodbye"), idempotency_key="order-17")
    assert not other.existed
    assert (await headrace.enqueue(CHAT, chat("Goodbye"), idempotency_key="order-17")).id == other.id


async def test_a_newer_configuration_counts_at_once(headrace: Headrace, pool: Pool) -> None:
    await headrace.enqueue(CHAT, chat())
    with pytest.raises(InvalidRequest, match=r"^lane: 'night' is not one of"):
        await headrace.enqueue(CHAT, chat(), lane="night")
    await configurations.apply(pool, parse_toml("[lanes]\nnight = 1", "test"), "test")
    assert (await (await headrace.enqueue(CHAT, chat(), lane="night")).get()).lane == "night"
    without_night = parse_toml("[retries]\nmax_attempts = 2", "test")
    await configurations.apply(pool, without_night, "test")
    with pytest.raises(InvalidRequest, match="lane"):
        await headrace.enqueue(CHAT, chat(), lane="night")
    assert (await (await headrace.enqueue(CHAT, chat())).get()).max_attempts == 2


async def test_redis_may_be_away(postgres_url: str, pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    async with Headrace(postgres_url, "unix:///nowhere/valkey.sock") as headrace:
        await headrace.enqueue(CHAT, chat())
        await headrace.enqueue_many([JobRequest(CHAT, chat())] * 3)
    assert await count(pool) == 4
    (warning,) = [record.message for record in caplog.records]
    assert warning.startswith("Redis is not told of new jobs, workers find them later: Redis at /nowhere")
