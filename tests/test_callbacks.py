"""A job's ending reaches its receiver: signed, whole, and as exactly one event."""

import json
from collections.abc import AsyncIterator, Mapping
from datetime import datetime, timedelta

import pytest

from headrace_shared import webhooks
from headrace_shared.dispatch.dispatch import Dispatch
from headrace_shared.errors import WebhookVerificationFailed
from headrace_shared.ids import JobId, Tenant, WorkerId
from headrace_shared.job import JobState
from headrace_shared.store import claims, lost
from headrace_shared.store.jobs import cancel_job
from headrace_shared.store.pool import Pool
from headrace_shared.testing.clock import Clock
from headrace_shared.testing.jobs import TENANT, Jobs, eventually
from headrace_shared.testing.simulated_provider import SimulatedProvider
from headrace_shared.testing.webhook_receiver import WebhookReceiver
from headrace_workers.testing import running_worker

pytestmark = [pytest.mark.conformance, pytest.mark.usefixtures("environment", "hooks")]

MASTER = "whsec-master-of-this-test"


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_WEBHOOK_SECRET", MASTER)
    monkeypatch.setenv("HEADRACE_WEBHOOK_ALLOW_HTTP", "true")
    monkeypatch.setenv("HEADRACE_WEBHOOK_ALLOWED_NETWORKS", "127.0.0.0/8")


@pytest.fixture
def jobs(pool: Pool, dispatch: Dispatch) -> Jobs:
    return Jobs(pool, dispatch)


def genuine(body: bytes, headers: Mapping[str, str]) -> None:
    webhooks.verify(body, headers, webhooks.tenant_secret(MASTER.encode(), TENANT))


@pytest.fixture
async def receiver() -> AsyncIterator[WebhookReceiver]:
    async with WebhookReceiver(verify=genuine) as receiver:
        yield receiver


async def delivered(jobs: Jobs, ids: list[JobId]) -> None:
    """Wait until every callback is on record as delivered."""

    async def missing() -> int:
        return int(
            await jobs.pool.fetchval(
                "SELECT count(*) FROM unnest($1::uuid[]) AS wanted WHERE NOT EXISTS (SELECT FROM"
                " headrace.deliveries d WHERE d.job_id = wanted AND d.state = 'delivered')",
                ids,
            )
        )

    await eventually(missing, lambda left: left == 0)


async def test_a_success_says_what_it_cost_and_what_it_was(
    jobs: Jobs, provider: SimulatedProvider, receiver: WebhookReceiver
) -> None:
    (job_id,) = await jobs.add(webhook=receiver.url)
    async with running_worker():
        (ending,) = await jobs.ended([job_id])
        await delivered(jobs, [job_id])
    (delivery,) = receiver.accepted
    event = json.loads(delivery.body)
    assert event["type"] == "job.succeeded"
    assert datetime.fromisoformat(event["timestamp"]) == ending.job.ended_at
    assert event["data"] == {
        "id": str(job_id),
        "status": "succeeded",
        "tenant": TENANT,
        "endpoint": "/v1/chat/completions",
        "model": "gpt-4o-mini",
        "attempts": 1,
        "usage": {
            "prompt_tokens": ending.bill.usage.prompt_tokens,
            "completion_tokens": ending.bill.usage.completion_tokens,
            "cost_nano_usd": ending.bill.cost,
        },
        "metadata": {"number": "0"},
    }
    assert ending.bill.cost > 0
    (row,) = await jobs.deliveries(job_id)
    assert (row["state"], row["attempts"], f"evt_{row['id'].hex}") == ("delivered", 1, delivery.id)


async def test_a_failure_says_why(jobs: Jobs, provider: SimulatedProvider, receiver: WebhookReceiver) -> None:
    (job_id,) = await jobs.add(model="nobody-knows-this", webhook=receiver.url)
    async with running_worker():
        await delivered(jobs, [job_id])
    event = json.loads(receiver.accepted[0].body)
    assert (event["type"], event["data"]["status"]) == ("job.failed", "failed")
    assert event["data"]["error"]["class"] == "unknown_price"
    assert "nobody-knows-this" in event["data"]["error"]["message"]


async def test_every_ending_is_one_event(
    jobs: Jobs, provider: SimulatedProvider, receiver: WebhookReceiver, clock: Clock
) -> None:
    """Also of a job that nobody finished: cancelled while it waited, or quarantined."""
    succeeded = await jobs.add(5, webhook=receiver.url)
    (cancelled,) = await jobs.add(webhook=receiver.url, push=False, delay=timedelta(hours=1))
    (failed,) = await jobs.add(model="nobody-knows-this", webhook=receiver.url)
    (reaped,) = await jobs.add(webhook=receiver.url, push=False)
    await cancel_job(jobs.pool, cancelled)
    for _ in range(5):
        await claims.claim_jobs(jobs.pool, [reaped], WorkerId("dead"), timedelta(seconds=30), alone=True)
        await clock.advance(timedelta(seconds=31))
        await lost.reap(jobs.pool)
    everything = [*succeeded, cancelled, failed, reaped]
    async with running_worker():
        endings = await jobs.ended(everything)
        await delivered(jobs, everything)
    states = [*[JobState.SUCCEEDED] * 5, JobState.CANCELLED, JobState.FAILED, JobState.FAILED]
    assert [ending.job.state for ending in endings] == states
    events = [json.loads(delivery.body) for delivery in receiver.accepted]
    sent = sorted((event["data"]["id"], event["type"]) for event in events)
    assert sent == sorted((str(one.job.id), f"job.{one.job.state}") for one in endings)
    assert len({delivery.id for delivery in receiver.accepted}) == len(everything)


async def test_a_callback_that_fails_is_repeated_under_the_same_id(
    jobs: Jobs, provider: SimulatedProvider
) -> None:
    await jobs.configure({"webhooks": {"schedule": ["0s", "10ms", "10ms"]}})
    async with WebhookReceiver(verify=genuine, statuses=(503, 200)) as receiver:
        (job_id,) = await jobs.add(webhook=receiver.url)
        async with running_worker():
            await delivered(jobs, [job_id])
        assert [delivery.status for delivery in receiver.deliveries] == [503, 200]
        assert len({delivery.id for delivery in receiver.deliveries}) == 1
    assert len(await jobs.deliveries(job_id)) == 1


async def test_each_tenant_has_a_secret_of_its_own(jobs: Jobs, provider: SimulatedProvider) -> None:
    async with WebhookReceiver() as receiver:
        (job_id,) = await jobs.add(webhook=receiver.url, tenant=Tenant("other"))
        async with running_worker():
            await delivered(jobs, [job_id])
        (delivery,) = receiver.deliveries
    secret = webhooks.tenant_secret(MASTER.encode(), Tenant("other"))
    webhooks.verify(delivery.body, delivery.headers, secret)
    with pytest.raises(WebhookVerificationFailed):
        genuine(delivery.body, delivery.headers)


async def test_without_a_webhook_nobody_is_called(jobs: Jobs, provider: SimulatedProvider) -> None:
    (job_id,) = await jobs.add()
    async with running_worker():
        await jobs.ended([job_id])
    assert await jobs.deliveries(job_id) == []
