"""A Redis that comes back with an old copy of the counters holds no money twice."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from headrace_shared.budgets import Budgets
from headrace_shared.dispatch.connection import Redis
from headrace_shared.embedded import binaries
from headrace_shared.errors import DispatchUnavailable
from headrace_shared.money import NanoUSD
from headrace_shared.store.money import BudgetPolicy, WindowKind
from headrace_shared.store.pool import Pool
from headrace_shared.testing.spending import Spender, counted


class Server:
    """A Valkey of a test's own, which is saved and killed at will."""

    def __init__(self, directory: Path) -> None:
        self._socket = directory / "valkey.sock"
        self._directory = directory
        self._process: asyncio.subprocess.Process | None = None
        self.url = f"unix://{self._socket}"

    async def start(self) -> None:
        options = {"unixsocket": str(self._socket), "port": "0", "dir": str(self._directory), "save": ""}
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        self._process = await asyncio.create_subprocess_exec(
            binaries.valkey(), *arguments, stdout=asyncio.subprocess.PIPE
        )
        assert self._process.stdout is not None
        while b"Ready to accept connections" not in await self._process.stdout.readline():
            assert self._process.returncode is None

    async def save(self) -> None:
        reader, writer = await asyncio.open_unix_connection(self._socket)
        writer.write(b"SAVE\r\n")
        assert await reader.readline() == b"+OK\r\n"
        writer.close()
        await writer.wait_closed()

    async def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        await self._process.communicate()


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    with TemporaryDirectory(prefix="headrace-") as directory:
        server = Server(Path(directory))
        await server.start()
        yield server
        await server.kill()


async def test_an_old_snapshot_holds_nothing_in_the_very_call_that_finds_it(
    pool: Pool, server: Server
) -> None:
    redis = Redis(server.url)
    budgets, spender = Budgets(pool, redis), await Spender.start(pool)
    await budgets.set("global", WindowKind.TOTAL, NanoUSD(100), BudgetPolicy.WAIT)
    await spender.open(budgets, 40, "global")
    await server.save()
    await spender.open(budgets, 50, "global")
    await server.kill()
    await server.start()
    refused = None
    while refused is None:
        try:
            refused = await spender.refused(budgets, 40, "global")
        except DispatchUnavailable:
            continue
    assert (refused.missing, refused.held_by_others) == (30, 90)
    assert await counted(redis, "global") == (0, 0, 90)
    await spender.open(budgets, 10, "global")
    await redis.close()
