"""A TCP proxy between a client and one server that breaks the network as it is told to."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self

from headrace_shared.testing.network_faults import Drop, NetworkFault, Reset
from headrace_shared.testing.proxied_connection import Link, ProxiedConnection, close, reset
from headrace_shared.testing.proxied_urls import Target


class FaultProxy:
    """A way to one server that can be made to fail, on a free loopback port.

    ::

        async with FaultProxy(postgres_url) as proxy:
            pool = await open_pool(proxy.url)
            async with proxy.during(BlackHole()):
                ...

    Like the network it stands for, it holds back rather than loses: when a fault that only held bytes back
    is healed, they are delivered. It holds a bounded amount, then stops reading.

    Raises InvalidConfiguration for a URL that it cannot lead to.
    """

    def __init__(self, target_url: str, *, port: int = 0) -> None:
        self.accepted = 0
        """Connections that ever came in."""
        self._target = Target.parse(target_url)
        self._link = Link()
        self._port = port
        self._open: dict[asyncio.Task[None], ProxiedConnection] = {}

    async def __aenter__(self) -> Self:
        self._listening = socket.create_server(("127.0.0.1", self._port), backlog=1024)
        self._listening.settimeout(0)
        self._port = self._listening.getsockname()[1]
        self._accepting = asyncio.create_task(self._accept())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._accepting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._accepting
        self._listening.close()
        self._end_all(reset=False)
        await self._gone()

    @property
    def url(self) -> str:
        """The server's URL, through this proxy; Postgres' says `sslmode=disable` unless it says another."""
        return self._target.through(self._port)

    @property
    def port(self) -> int:
        return self._port

    @property
    def connections(self) -> int:
        """Connections that are open now."""
        return len(self._open)

    @property
    def fault(self) -> NetworkFault | None:
        """What is wrong at present."""
        return self._link.fault

    @property
    def held(self) -> int:
        """Bytes that came in and that the fault holds back."""
        return self._link.held

    async def holding(self, count: int = 1) -> None:
        """Wait until at least so many bytes are held: what a test that expects no answer can wait for."""
        while self._link.held < count:
            await self._link.more_held.wait()

    def cause(self, fault: NetworkFault) -> None:
        """Let this be wrong from now on, in the place of what was wrong before."""
        self._link.change(fault)
        if isinstance(fault, Drop | Reset):
            self._end_all(reset=isinstance(fault, Reset))

    def heal(self) -> None:
        """Let nothing be wrong: what was held back is delivered; what was closed stays closed."""
        self._link.change(None)

    @asynccontextmanager
    async def during(self, fault: NetworkFault) -> AsyncGenerator[None]:
        """Cause a fault and heal it at the end."""
        self.cause(fault)
        try:
            yield
        finally:
            self.heal()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            client, _ = await loop.sock_accept(self._listening)
            self.accepted += 1
            match self._link.fault:
                case Drop():
                    close(client)
                case Reset():
                    reset(client)
                case _:
                    self._serve(client)

    def _serve(self, client: socket.socket) -> None:
        connection = ProxiedConnection(self._link, self._target, client)
        task = asyncio.create_task(connection.run())
        self._open[task] = connection
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        del self._open[task]
        if not task.cancelled():
            task.result()

    def _end_all(self, *, reset: bool) -> None:
        for task, connection in self._open.items():
            connection.in_good_order = not reset
            task.cancel()

    async def _gone(self) -> None:
        while self._open:
            await asyncio.wait(list(self._open))
