"""Processes that a command starts beside itself, each ended by its own pid."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

WORKER = (sys.executable, "-P", "-c", "from headrace_producer.cli import main; main()", "worker")
"""The command of a worker process."""

_PATIENCE_SECONDS = 15.0
_LAST_LINES = 15


class ProcessEnded(Exception):
    """A process that is needed has ended by itself; the message has its last words."""


@dataclass(frozen=True, slots=True)
class Child:
    """One process and where it writes what it has to say."""

    name: str
    process: asyncio.subprocess.Process
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def runs(self) -> bool:
        return self.process.returncode is None

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal; one that is gone is not missed."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    async def kill(self) -> None:
        """Do what `kill -9` does, and wait until the process is gone."""
        self.signal(signal.SIGKILL)
        await self.process.wait()

    async def end(self) -> None:
        """Ask it to end; insist when it does not."""
        if not self.runs:
            return
        with suppress(ProcessLookupError):
            self.process.terminate()
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                await self.process.wait()
        except TimeoutError:
            await self.kill()

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        return "\n".join([f"{self.name} (pid {self.pid}) said last:", *(f"  {line}" for line in lines)])

    def check(self) -> None:
        """Raise ProcessEnded when it does not run any more."""
        if not self.runs:
            raise ProcessEnded(f"{self.name} ended with {self.process.returncode}\n{self.last_words()}")


async def start(
    name: str, command: tuple[str, ...], environment: Mapping[str, str], log: Path, *, piped: bool = False
) -> Child:
    """Start a process in a session of its own, so that Ctrl-C does not reach it."""
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *command,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE if piped else output,
            stderr=output,
            start_new_session=True,
        )
    return Child(name, process, log)


@asynccontextmanager
async def child(
    name: str, command: tuple[str, ...], environment: Mapping[str, str], log: Path, *, piped: bool = False
) -> AsyncGenerator[Child]:
    """Do what `start` does, and end the process on exit."""
    started = await start(name, command, environment, log, piped=piped)
    try:
        yield started
    finally:
        await asyncio.shield(started.end())
