"""A worker inside a test's own event loop."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from headrace_shared.settings import load_settings
from headrace_workers.service import open_worker
from headrace_workers.worker import Worker


@asynccontextmanager
async def running_worker(**settings: object) -> AsyncGenerator[Worker]:
    """Run a worker with the settings of the environment and these; it drains at the end."""
    given = {"concurrency": 8, "lease_seconds": 5, "drain_seconds": 5, **settings}
    async with open_worker(load_settings(**given), handle_signals=False) as worker:
        main = asyncio.create_task(worker.main(), name="worker")
        try:
            yield worker
        finally:
            worker.stop()
            await main
