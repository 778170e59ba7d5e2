"""Workers in processes of their own, for tests that kill them."""

import asyncio
import os
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from headrace_shared.testing.jobs import eventually

RUNNER = (
    "from headrace_shared import logs; logs.configure()\n"
    "from headrace_shared.settings import load_settings\n"
    "from headrace_workers.command import run\n"
    "run(load_settings())"
)
HEADRACE = (sys.executable, "-c", RUNNER)
ARQ = (str(Path(sys.executable).with_name("arq")), "headrace_workers.WorkerSettings")
LEASE_SECONDS = 6
"""Longer than a loaded machine keeps a process from renewing it."""


@asynccontextmanager
async def worker(
    command: Sequence[str] = HEADRACE,
    *,
    log: Path | None = None,
    environment: Mapping[str, str] | None = None,
    **settings: object,
) -> AsyncGenerator[asyncio.subprocess.Process]:
    """A worker in a process of its own, in the environment of the test; killed at the end."""
    given = {"concurrency": 8, "lease_seconds": LEASE_SECONDS, **settings}
    variables = {f"HEADRACE_{name.upper()}": str(value) for name, value in given.items()}
    with (log or Path(os.devnull)).open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            *command,
            env={**os.environ, **variables, **(environment or {})},
            stderr=output if log else None,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def gone(pid: int) -> None:
    """Wait until there is no such process."""

    async def alive() -> bool:
        return await asyncio.to_thread(Path(f"/proc/{pid}").exists)

    await eventually(alive, lambda found: not found)
