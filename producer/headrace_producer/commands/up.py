"""`headrace up`: servers, schema and workers in one terminal, for a laptop."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from headrace_producer.commands.options import AsJson
from headrace_producer.console import Console, count
from headrace_shared.configuration_sections import DEFAULT_PROVIDER
from headrace_shared.embedded import EmbeddedServers
from headrace_shared.errors import InvalidConfiguration, MissingSetting
from headrace_shared.servers import WEBHOOK_SECRET, own_servers, own_webhook_secret
from headrace_shared.settings import Settings, load_settings
from headrace_shared.store import configurations
from headrace_shared.store.pool import connect

WORKER = (sys.executable, "-P", "-m", "headrace_producer", "worker")

_BAD_CONFIGURATION = 2
_GRACE_SECONDS = 10.0
"""On top of what a worker takes to let its jobs end."""

_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 30.0


def up(
    *,
    workers: Annotated[int, typer.Option(min=0, max=64, help="Worker processes.")] = 1,
    concurrency: Annotated[
        int | None, typer.Option(min=1, max=10_000, help="Jobs each runs at a time.")
    ] = None,
    directory: Annotated[Path, typer.Option(help="Where .headrace/ is kept.")] = Path(),
    as_json: AsJson = False,
) -> None:
    """Start PostgreSQL, Valkey and workers here until Ctrl-C; the data stays in .headrace/."""
    settings = load_settings()
    for name, url in (("POSTGRES", settings.postgres_url), ("REDIS", settings.redis_url)):
        if url:
            raise InvalidConfiguration(
                where=f"HEADRACE_{name}_URL",
                reason="is set, but 'headrace up' starts servers of its own: unset it, "
                "or use 'headrace migrate' and 'headrace worker'",
            )
    raise typer.Exit(asyncio.run(_up(Console(as_json), settings, workers, concurrency, directory)))


async def _up(
    console: Console, settings: Settings, workers: int, concurrency: int | None, directory: Path
) -> int:
    async with own_servers(directory) as servers:
        environment = dict(os.environ) | {
            "HEADRACE_POSTGRES_URL": servers.postgres_url,
            "HEADRACE_REDIS_URL": servers.redis_url,
        }
        environment.setdefault(WEBHOOK_SECRET, own_webhook_secret(directory))
        command = [*WORKER, *(["--concurrency", str(concurrency)] if concurrency else [])]
        crew = Crew(console, command, environment, settings.drain.total_seconds() + _GRACE_SECONDS)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, crew.stop)
        if workers:
            await _require_key(servers)
        _announce(console, servers, workers, directory)
        code = await crew.work(workers)
        console.note("Stopped." if not code else "Stopped: a worker cannot run.")
        return code


async def _require_key(servers: EmbeddedServers) -> None:
    """Say before anything else that the workers would have no key.

    Raises:
        MissingSetting: the default provider's is not there.

    """
    connection = await connect(servers.postgres_url)
    try:
        configuration = (await configurations.current(connection)).configuration
    finally:
        await connection.close()
    try:
        configuration.provider(configuration.defaults.provider).api_key.resolve()
    except MissingSetting as error:
        if configuration.defaults.provider != DEFAULT_PROVIDER:
            raise
        reason = (
            f"{error.reason}; to try it without one, run 'headrace demo', or start "
            "'headrace simulate-provider', set OPENAI_BASE_URL to the address that it prints, "
            f"and {error.where} to anything"
        )
        raise MissingSetting(where=error.where, reason=reason) from None


def _announce(console: Console, servers: EmbeddedServers, workers: int, directory: Path) -> None:
    console.say(f"PostgreSQL  {servers.postgres_url}")
    console.say(f"Valkey      {servers.redis_url}")
    console.say(f"Workers     {count(workers, 'process', 'processes')}")
    console.say(f"Submit from another terminal in {directory.resolve()}, or below it:")
    console.say("  headrace submit requests.jsonl --wait -o results.jsonl")
    console.say("Ctrl-C stops it; the data stays in .headrace/.")
    console.conclude({"postgres_url": servers.postgres_url, "redis_url": servers.redis_url})
    sys.stdout.flush()


class Crew:
    """Worker processes: one that dies is replaced, one that is told it cannot run ends them all."""

    def __init__(
        self, console: Console, command: list[str], environment: Mapping[str, str], grace_seconds: float
    ) -> None:
        self._console = console
        self._command = command
        self._environment = environment
        self._grace_seconds = grace_seconds
        self._stopping = asyncio.Event()
        self._running: set[asyncio.subprocess.Process] = set()

    def stop(self) -> None:
        """Tell all workers to let their jobs end; told again, they give them back at once."""
        self._stopping.set()
        for process in self._running:
            _end(process)

    async def work(self, workers: int) -> int:
        """Keep so many workers running until `stop`; return the exit code."""
        codes = await asyncio.gather(*(self._keep_one() for _ in range(workers)), self._stopping.wait())
        return max(map(int, codes[:-1]), default=0)

    async def _keep_one(self) -> int:
        pause = _FIRST_PAUSE
        while not self._stopping.is_set():
            # A session of its own: Ctrl-C is for this process, which then tells the workers.
            process = await asyncio.create_subprocess_exec(
                *self._command,
                env=self._environment,
                stdin=asyncio.subprocess.DEVNULL,
                start_new_session=True,
            )
            self._running.add(process)
            if self._stopping.is_set():
                _end(process)  # it was not among those that `stop` told
            code = await self._ending_of(process)
            self._running.discard(process)
            if code == _BAD_CONFIGURATION:
                self.stop()
                return code
            if self._stopping.is_set():
                break
            self._console.note(f"A worker ended ({code}); another one takes its place.")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        return 0

    async def _ending_of(self, process: asyncio.subprocess.Process) -> int:
        """Wait for its end, when it is told to stop for so long as it may take.

        `stop` has told it then, and nobody else may: told again, a worker gives its jobs back at once.
        """
        ended = asyncio.ensure_future(process.wait())
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait((ended, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                await asyncio.wait((ended,), timeout=self._grace_seconds)
            if not ended.done():
                process.kill()
            return await ended
        finally:
            stopping.cancel()


def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
