"""The worker processes of the demo."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from headrace_producer.processes import WORKER, Child, child


@asynccontextmanager
async def workers(
    count: int, environment: Mapping[str, str], directory: Path
) -> AsyncGenerator[tuple[Child, ...]]:
    """Worker processes as `headrace worker` starts them; all of them are told to end at once."""
    async with AsyncExitStack() as stack:
        started = [
            await stack.enter_async_context(
                child(f"worker {number}", WORKER, environment, directory / f"worker-{number}.log")
            )
            for number in range(1, count + 1)
        ]
        try:
            yield tuple(started)
        finally:
            await asyncio.shield(asyncio.gather(*(one.end() for one in started)))
