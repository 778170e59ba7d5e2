"""A receiver of webhooks for tests: a real HTTP server that keeps what it was sent."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from aiohttp import web

from headrace_shared.testing.simulated_provider import listening_socket


@dataclass(frozen=True, slots=True)
class Delivery:
    """One request that reached the receiver."""

    headers: Mapping[str, str]
    """Names are in lower case."""
    body: bytes
    status: int
    """What it was answered."""
    rejected: Exception | None
    """What the verification raised."""
    at: float
    """When it came, in seconds since the epoch."""

    @property
    def id(self) -> str:
        """The `webhook-id`, the same for every attempt at one event."""
        return self.headers.get("webhook-id", "")


class WebhookReceiver:
    """A server that records deliveries and answers them with a sequence of statuses.

    `statuses` are answered in turn, the last one for ever. `verify` is called with each body and
    its headers, and rejects a delivery by raising: it is recorded, answered 400, and takes no
    status from the sequence.
    """

    def __init__(
        self,
        *,
        verify: Callable[[bytes, Mapping[str, str]], object] | None = None,
        statuses: Sequence[int] = (200,),
        answer_headers: Mapping[str, str] | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        path: str = "/hook",
    ) -> None:
        self.deliveries: list[Delivery] = []
        self._verify = verify
        self._statuses = list(statuses)
        self._answer_headers = dict(answer_headers or {})
        self._address = host, port
        self._path = path
        self._arrived = asyncio.Condition()
        self._runner = web.ServerRunner(web.Server(self._handle, access_log=None), shutdown_timeout=1)

    async def __aenter__(self) -> Self:
        listening = listening_socket(*self._address)
        self._address = self._address[0], listening.getsockname()[1]
        await self._runner.setup()
        await web.SockSite(self._runner, listening).start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._runner.cleanup()

    @property
    def url(self) -> str:
        host, port = self._address
        return f"http://{f'[{host}]' if ':' in host else host}:{port}{self._path}"

    @property
    def accepted(self) -> list[Delivery]:
        """The deliveries that were answered 2xx."""
        return [delivery for delivery in self.deliveries if delivery.status // 100 == _SUCCESS]

    def answer(self, *statuses: int) -> None:
        """Answer these in turn from now on, the last one for ever."""
        self._statuses = list(statuses)

    async def received(self, count: int) -> list[Delivery]:
        """Wait until there have been so many deliveries, and return all of them."""
        return await self.until(lambda: len(self.deliveries) >= count)

    async def until(self, condition: Callable[[], bool]) -> list[Delivery]:
        """Wait until a condition holds, asked at each delivery, and return all deliveries."""
        async with self._arrived:
            await self._arrived.wait_for(condition)
            return list(self.deliveries)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        at = time.time()
        body = await request.content.read()
        headers = {name.lower(): value for name, value in request.headers.items()}
        rejected = self._rejected(body, headers)
        status = self._next_status() if rejected is None else 400
        async with self._arrived:
            self.deliveries.append(Delivery(headers, body, status, rejected, at))
            self._arrived.notify_all()
        return web.Response(status=status, headers=self._answer_headers)

    def _rejected(self, body: bytes, headers: Mapping[str, str]) -> Exception | None:
        if self._verify is None:
            return None
        try:
            self._verify(body, headers)
        except Exception as error:  # noqa: BLE001 - whatever the caller's verification raises is a rejection
            return error
        return None

    def _next_status(self) -> int:
        return self._statuses.pop(0) if len(self._statuses) > 1 else self._statuses[0]


_SUCCESS = 2
