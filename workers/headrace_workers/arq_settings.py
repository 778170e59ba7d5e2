"""What arq's own command line starts: ``arq headrace_workers.WorkerSettings``.

arq's command builds arq's own worker from such settings and has no place for another one.
Its start-up hook is where Headrace's worker runs instead, from the first claim to the end
of its drain; arq's own loop is never reached.
"""

import asyncio
import sys
from collections.abc import Mapping

from arq.connections import RedisSettings
from arq.worker import func

from headrace_shared.errors import HeadraceError
from headrace_shared.settings import load_settings
from headrace_workers.worker import run_job


def worker_settings() -> Mapping[str, object]:
    """Read the environment; what is missing in it is one sentence and exit 2."""
    try:
        redis_url = load_settings().require_redis()
    except HeadraceError as error:
        sys.stderr.write(f"headrace: {error}\n")
        raise SystemExit(2) from None
    return {
        "functions": [func(run_job, name="headrace")],
        "on_startup": _run_in_place_of_arq,
        "redis_settings": RedisSettings.from_dsn(redis_url),
    }


async def _run_in_place_of_arq(ctx: dict[object, object]) -> None:
    from headrace_workers.service import open_worker  # noqa: PLC0415 - the SDKs load when a worker runs

    del ctx
    async with open_worker(load_settings(), handle_signals=False) as worker:
        running = asyncio.create_task(worker.main(), name="worker")
        while not running.done():
            try:
                await asyncio.shield(running)
            except asyncio.CancelledError:
                # arq's signal handler cancels its main task, and with it this hook: the first
                # time to drain, the second to give everything back.
                if worker.draining:
                    worker.give_back()
                worker.stop()
    # arq's loop must not begin now, whoever stopped the worker.
    raise asyncio.CancelledError
