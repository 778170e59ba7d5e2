"""One worker, as `headrace worker` runs it, that says on request what it has used."""

import asyncio
import json
import logging
import resource
import sys

import uvloop

from headrace_shared.settings import load_settings
from headrace_workers.service import open_worker


def used() -> str:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return json.dumps({"cpu": usage.ru_utime + usage.ru_stime})


async def main() -> None:
    async with open_worker(load_settings(), handle_signals=False) as worker:
        running = asyncio.create_task(worker.main())
        print(used(), flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            print(used(), flush=True)
        worker.stop()
        await running


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
