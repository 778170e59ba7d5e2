"""`headrace up`: servers and workers in one terminal, until Ctrl-C."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO

import pytest

from headrace_producer import Headrace
from headrace_shared import webhooks
from headrace_shared.embedded import find_running
from headrace_shared.ids import Tenant
from headrace_shared.servers import own_webhook_secret
from headrace_shared.store import feed
from headrace_shared.store.pool import connect, open_pool
from headrace_shared.testing.jobs import eventually
from headrace_shared.testing.scripted_provider import ScriptedProvider
from headrace_shared.testing.simulated_provider import SimulatedProvider
from headrace_shared.testing.webhook_receiver import WebhookReceiver

HEADRACE = (sys.executable, "-m", "headrace_producer")
BODY = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello"}]}


async def start(
    folder: Path, *arguments: str, stderr: BinaryIO | int | None = None
) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *HEADRACE, *arguments, cwd=folder, env=os.environ, stdout=asyncio.subprocess.PIPE, stderr=stderr
    )


@pytest.fixture
async def up(tmp_path: Path, provider: SimulatedProvider) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await start(tmp_path, "up", "--concurrency", "10", "--json")
    yield process
    if process.returncode is None:
        process.send_signal(signal.SIGINT)
    await process.communicate()


async def test_a_submission_in_the_same_folder_is_run(
    up: asyncio.subprocess.Process, tmp_path: Path, provider: SimulatedProvider
) -> None:
    assert up.stdout is not None
    postgres_url: str = json.loads(await up.stdout.readline())["postgres_url"]
    row = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": BODY}
    (tmp_path / "requests.jsonl").write_text(json.dumps(row))
    submitted = await start(tmp_path, "submit", "requests.jsonl", "--wait", "-o", "results.jsonl")
    await submitted.communicate()
    assert submitted.returncode == 0
    result = json.loads((tmp_path / "results.jsonl").read_text())
    assert result["response"]["body"]["object"] == "chat.completion"
    assert provider.books.total.answered == 1
    await _a_dead_worker_is_replaced(postgres_url)
    up.send_signal(signal.SIGINT)
    assert await up.wait() == 0
    with pytest.raises(Exception, match="cannot be reached"):
        await connect(postgres_url)
    assert (tmp_path / ".headrace").is_dir()


async def _a_dead_worker_is_replaced(postgres_url: str) -> None:
    pool = await open_pool(postgres_url)
    try:
        (first,) = await feed.live_workers(pool)
        os.kill(int(first.id.rsplit("-", 2)[1]), signal.SIGKILL)
        await eventually(
            lambda: feed.live_workers(pool), lambda alive: any(one.id != first.id for one in alive)
        )
    finally:
        await pool.close()


async def test_a_worker_in_the_same_folder_serves_its_servers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, provider: SimulatedProvider
) -> None:
    """And it signs callbacks with the folder's own secret."""
    monkeypatch.setenv("HEADRACE_WEBHOOK_ALLOW_HTTP", "true")
    monkeypatch.setenv("HEADRACE_WEBHOOK_ALLOWED_NETWORKS", "127.0.0.0/8")
    (tmp_path / "below").mkdir()

    def genuine(body: bytes, headers: Mapping[str, str]) -> None:
        master = own_webhook_secret(tmp_path).encode()
        webhooks.verify(body, headers, webhooks.tenant_secret(master, Tenant("default")))

    async with Headrace.embedded(tmp_path) as headrace, WebhookReceiver(verify=genuine) as receiver:
        own_webhook_secret(tmp_path)
        job = await headrace.enqueue("/v1/chat/completions", BODY, webhook=receiver.url)
        worker = await start(tmp_path / "below", "worker")
        try:
            assert (await job.result(timeout=timedelta(seconds=30))).attempts == 1
            (delivery,) = await asyncio.wait_for(receiver.received(1), 30)
            assert delivery.rejected is None
        finally:
            worker.terminate()
            await worker.communicate()
    assert worker.returncode == 0
    assert find_running(tmp_path) is None


async def test_what_runs_at_the_signal_is_let_end_and_the_worker_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent: ScriptedProvider
) -> None:
    monkeypatch.chdir(tmp_path)
    log = tmp_path / "log"
    with log.open("wb") as output:
        up = await start(tmp_path, "up", "--json", stderr=output)
    try:
        assert up.stdout is not None
        await up.stdout.readline()
        async with Headrace() as headrace:
            job = await headrace.enqueue("/v1/chat/completions", BODY)
            await silent.arrived(1)
            up.terminate()
            await eventually(
                lambda: _lines(log), lambda lines: any("draining 1 jobs" in one for one in lines)
            )
            silent.open.set()
            assert await up.wait() == 0
            assert (await headrace.get(job.id)).state == "succeeded"
    finally:
        if up.returncode is None:
            up.terminate()
        await up.communicate()
    lines = await _lines(log)
    assert len([one for one in lines if "draining" in one]) == 1


async def _lines(path: Path) -> list[str]:
    return (await asyncio.to_thread(path.read_text)).splitlines()


async def test_a_worker_that_cannot_run_stops_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = await start(tmp_path, "up", stderr=asyncio.subprocess.PIPE)  # no key of the default provider
    _, said = await process.communicate()
    assert process.returncode == 2
    line = said.decode().splitlines()[-1]
    assert line.startswith("headrace: OPENAI_API_KEY is not set: put the secret into")
    assert "to try it without one, run 'headrace demo', or start 'headrace simulate-provider'" in line
