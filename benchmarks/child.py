"""A process of its own for each side, so that processor time and memory are counted apart."""

import asyncio
import contextlib
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeAlias

from pydantic import TypeAdapter

Answer: TypeAlias = dict[str, float | str]

_ANSWER = TypeAdapter(Answer)
_SCRIPTS = Path(__file__).parent
_PATIENCE_SECONDS = 120


class Child:
    """A Python process that says lines of JSON, of itself or when it is asked."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.pid = process.pid

    async def ask(self) -> Answer:
        if self._process.stdin is not None:
            self._process.stdin.write(b"\n")
        return await self.hear()

    async def tell(self) -> None:
        """Send it a line that it does not answer."""
        if self._process.stdin is not None:
            self._process.stdin.write(b"\n")
            await self._process.stdin.drain()

    async def hear(self) -> Answer:
        if self._process.stdout is None:
            return {}
        async with asyncio.timeout(_PATIENCE_SECONDS):
            line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a process of the benchmark ended with {await self._process.wait()}")
        return _ANSWER.validate_json(line)

    async def cpu(self) -> float:
        """Return the processor time that it has used, in seconds."""
        return float((await self.ask())["cpu"])

    async def resident(self) -> float:
        """Return its resident memory in MiB."""
        ps = await asyncio.create_subprocess_exec("ps", "-o", "rss=", "-p", str(self.pid), stdout=PIPE)
        out, _ = await ps.communicate()
        return int(out) / 1024

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def leave(self) -> None:
        """Let it end by closing its input; end it when it does not."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            async with asyncio.timeout(20):
                await self._process.wait()
        except TimeoutError:
            self.kill()
            await self._process.wait()


@asynccontextmanager
async def child(
    script: str, *arguments: str | float, environment: Mapping[str, str]
) -> AsyncGenerator[Child]:
    """Run a script of this folder."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(_SCRIPTS / script),
        *(str(argument) for argument in arguments),
        stdin=PIPE,
        stdout=PIPE,
        env=environment,
    )
    started = Child(process)
    try:
        yield started
    except BaseException:
        started.kill()
        raise
    finally:
        await started.leave()
