"""The simulated provider as a process of its own: `provider_process.py LATENCY_SECONDS`."""

import asyncio
import json
import sys
from datetime import timedelta

import uvloop

from headrace_shared.testing.behaviour import Behaviour
from headrace_shared.testing.simulated_provider import SimulatedProvider


async def main() -> None:
    async with SimulatedProvider(Behaviour(latency=timedelta(seconds=float(sys.argv[1])))) as provider:
        print(json.dumps({"url": provider.url}), flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            books = provider.books
            total = books.total
            said = {
                "requests": total.requests,
                "in_flight": books.in_flight,
                "answered": total.answered,
                "prompt_tokens": total.prompt_tokens + total.unanswered_prompt_tokens,
                "cached_tokens": total.cached_tokens,
                "completion_tokens": total.completion_tokens + total.unanswered_completion_tokens,
            }
            print(json.dumps(said), flush=True)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
