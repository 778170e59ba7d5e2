"""How long an idle worker takes from the call of enqueue until its request is at the provider."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import timedelta
from statistics import median, quantiles

from aiohttp import web
from figures import Figure, progress
from stage import Stage, body, open_stage

from headrace_shared.testing.simulated_provider import listening_socket

_NAME = "pickup by an idle worker"
_JOBS = 300
_WARM_UP = 20
_PAUSE_SECONDS = 0.01
_ANSWER = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1_700_000_000,
    "model": "gpt-4o-mini",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Hello."}}],
    "usage": {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12},
}


class Receiver:
    """A provider that notes when a request arrived, by this process's clock."""

    def __init__(self) -> None:
        self.url = ""
        self.received_at = 0.0

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        self.received_at = time.perf_counter()
        await request.read()
        return web.json_response(_ANSWER)


@asynccontextmanager
async def receiver() -> AsyncGenerator[Receiver]:
    started = Receiver()
    runner = web.ServerRunner(web.Server(started.answer, access_log=None))
    await runner.setup()
    listening = listening_socket("127.0.0.1", 0)
    started.url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    await web.SockSite(runner, listening).start()
    try:
        yield started
    finally:
        await runner.cleanup()


async def measure(jobs: int) -> list[Figure]:
    del jobs
    async with (
        open_stage() as stage,
        receiver() as provider,
        stage.workers(1, slots=100, provider_url=provider.url),
    ):
        for _ in range(_WARM_UP):
            await _time_one(stage, provider)
        times = [await _time_one(stage, provider) for _ in range(_JOBS)]
    picked_up = [picked for _, picked in times]
    progress(f"{_NAME}: {median(picked_up):.1f} ms in the middle")
    return [
        Figure(_NAME, "enqueue returned, p50", median(accepted for accepted, _ in times), "ms"),
        Figure(_NAME, "request received, p50", median(picked_up), "ms", at_most=10),
        Figure(_NAME, "request received, p99", quantiles(picked_up, n=100)[-1], "ms"),
    ]


async def _time_one(stage: Stage, provider: Receiver) -> tuple[float, float]:
    """Return the ms from the call until it returned, and until the request was received."""
    began = time.perf_counter()
    job = await stage.headrace.enqueue("/v1/chat/completions", body(0))
    accepted = time.perf_counter()
    await job.result(timeout=timedelta(seconds=20))
    await asyncio.sleep(_PAUSE_SECONDS)  # the worker listens for the next one again
    return 1000 * (accepted - began), 1000 * (provider.received_at - began)
