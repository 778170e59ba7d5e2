"""`headrace webhooks`: the secret that verifies a callback, and what came of its attempts."""

import asyncio
import json
from datetime import timedelta
from pathlib import Path

import pytest

from headrace_producer import cli
from headrace_shared.ids import JobId, Lane, RouteName, Tenant, new_job_id
from headrace_shared.job import NewJob
from headrace_shared.request import Endpoint
from headrace_shared.store import jobs
from headrace_shared.store.deliveries import AttemptRecord, claim_deliveries, record_attempts
from headrace_shared.store.pool import Pool
from headrace_shared.webhooks import tenant_secret

pytestmark = pytest.mark.usefixtures("environment")


async def cancelled_job(pool: Pool) -> JobId:
    job = NewJob(
        id=new_job_id(),
        tenant=Tenant("acme"),
        lane=Lane("default"),
        route=RouteName("gpt-4o-mini"),
        endpoint=Endpoint.CHAT_COMPLETIONS,
        body=b"{}",
        max_attempts=6,
        webhook="https://example.com/hook",
    )
    await jobs.insert_jobs(pool, [job], configuration=0, keep_keys=timedelta(days=1))
    await jobs.cancel_job(pool, job.id)
    return job.id


async def headrace(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = await asyncio.to_thread(cli.run, list(arguments))
    captured = capsys.readouterr()
    return code, captured.out + captured.err


async def test_the_secret_is_the_one_that_signs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_WEBHOOK_SECRET", "master")
    code, out = await headrace(capsys, "webhooks", "secret", "--tenant", "acme")
    assert (code, out.strip()) == (0, tenant_secret(b"master", Tenant("acme")))


async def test_a_missing_secret_is_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HEADRACE_WEBHOOK_SECRET", raising=False)
    monkeypatch.chdir(tmp_path)
    code, out = await headrace(capsys, "webhooks", "secret")
    assert code == 2
    assert "HEADRACE_WEBHOOK_SECRET" in out
    assert len(out.strip().splitlines()) == 1


async def test_every_attempt_is_shown(pool: Pool, capsys: pytest.CaptureFixture[str]) -> None:
    job_id = await cancelled_job(pool)
    [delivery] = await claim_deliveries(
        pool, limit=1, per_receiver=1, in_flight={}, lease=timedelta(minutes=1)
    )
    failed = AttemptRecord(
        delivery, timedelta(seconds=1), "pending", timedelta(seconds=5), 500, "status", "no"
    )
    await record_attempts(pool, [failed])
    code, out = await headrace(capsys, "webhooks", "deliveries", str(job_id), "--json")
    [shown] = json.loads(out.splitlines()[-1])["deliveries"]
    assert code == 0
    assert shown["webhook_id"] == f"evt_{delivery.id.hex}"
    assert (shown["state"], shown["event_type"]) == ("pending", "job.cancelled")
    [attempt] = shown["attempts"]
    assert (attempt["number"], attempt["status"], attempt["error_class"]) == (1, 500, "status")
