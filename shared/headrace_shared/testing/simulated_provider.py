"""A provider that speaks the OpenAI wire over real HTTP, calls no model, and says so in every answer."""

import asyncio
import os
import socket
from types import TracebackType
from typing import Self

from aiohttp import hdrs, web

from headrace_shared.testing.answers import answer
from headrace_shared.testing.behaviour import Behaviour, Fate, Fates
from headrace_shared.testing.books import Books
from headrace_shared.testing.calls import Endpoint, Refusal, read
from headrace_shared.testing.control import answer_control
from headrace_shared.testing.exchange import Exchange
from headrace_shared.testing.limits import RateLimits
from headrace_shared.testing.streams import events


class SimulatedProvider:
    """A provider for tests, benchmarks and demos, in this process, behind a real socket.

    ::

        async with SimulatedProvider(Behaviour(fail=0.05)) as provider:
            client = AsyncOpenAI(base_url=provider.url, api_key="any")

    Some models are special: `missing-*` is 404, `quota-*` is out of quota, `refused-*` is refused
    by the content filter, `filtered-*` is stopped by it.
    """

    def __init__(
        self,
        behaviour: Behaviour | None = None,
        *,
        port: int = 0,
        host: str = "127.0.0.1",
        record: bool = False,
    ) -> None:
        self.books = Books(record=record)
        self.peers: tuple[str, ...] = ()
        """The private addresses of all processes that share this one's port, its own included."""
        self._address = host, port
        self._prefix = os.urandom(6).hex()
        self._requests = 0
        server = web.Server(self._handle, handler_cancellation=True, access_log=None)
        self._runner = web.ServerRunner(server, shutdown_timeout=_GRACE_SECONDS)
        self.behave(behaviour or Behaviour())

    async def __aenter__(self) -> Self:
        host, port = self._address
        listening = listening_socket(host, port)
        self._address = host, listening.getsockname()[1]
        await self.listen(listening)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def url(self) -> str:
        """What a client takes as its base URL."""
        host, port = self._address
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"

    @property
    def behaviour(self) -> Behaviour:
        return self._behaviour

    def behave(self, behaviour: Behaviour) -> None:
        """Behave so from the next request on; the seeded sequence of failures starts again."""
        self._behaviour = behaviour
        self._fates = Fates(behaviour)
        self._limits = RateLimits(
            behaviour.requests_per_minute, behaviour.tokens_per_minute, behaviour.enforcement
        )

    def reset(self) -> None:
        """Empty the books, and start the seeded sequence of failures again."""
        self.books.clear()
        self.behave(self._behaviour)

    async def listen(self, listening: socket.socket) -> None:
        """Serve one more socket, which is closed with the provider."""
        if self._runner.server is None:
            await self._runner.setup()
        await web.SockSite(self._runner, listening, backlog=_BACKLOG).start()

    async def close(self) -> None:
        """Stop; calls that are still in flight are cut off."""
        await self._runner.cleanup()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        endpoint = _ENDPOINTS.get(request.path)
        if endpoint is None or request.method != hdrs.METH_POST:
            return await answer_control(self, request, self._next_number())
        raw = await request.content.read()
        key = request.headers.get(hdrs.AUTHORIZATION, "").removeprefix("Bearer ").strip()
        self.books.arrive(key or "none")
        try:
            return await self._answer(endpoint, request, key, raw)
        finally:
            self.books.leave()

    async def _answer(
        self, endpoint: Endpoint, request: web.BaseRequest, key: str, raw: bytes
    ) -> web.StreamResponse:
        exchange = Exchange(self.books, endpoint, request, self._next_number())
        call = _OUTAGE if self._behaviour.outage else read(endpoint, raw) if key else _NO_KEY
        if isinstance(call, Refusal):
            return exchange.refuse(call)
        standing = self._limits.take(call.model, call.prompt_tokens + (call.max_tokens or 0))
        fate, latency = self._fates.draw()
        exchange.accept(call, standing.headers, latency)
        if standing.exceeded is not None or fate is Fate.RATE_LIMITED:
            return exchange.limit(standing, self._behaviour.retry_after)
        if fate is Fate.SERVER_ERROR:
            await asyncio.sleep(latency)
            return exchange.refuse(_SERVER_ERROR)
        made = answer(call, exchange.number, self._behaviour.output_tokens)
        if call.stream and fate is not Fate.HUNG:
            return await exchange.stream(made, events(call, made), fate, latency)
        return await exchange.send(made, fate, latency)

    def _next_number(self) -> str:
        self._requests += 1
        return f"{self._prefix}{self._requests:08x}"


def listening_socket(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """Return a bound socket; `shared` lets other processes bind the same port and share its calls."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=_BACKLOG, reuse_port=shared)


_ENDPOINTS = {endpoint.value: endpoint for endpoint in Endpoint}
_BACKLOG = 4096
_GRACE_SECONDS = 0.05
_OUTAGE = Refusal(503, "The provider is down (simulated).", type="server_error", code="service_unavailable")
_SERVER_ERROR = Refusal(500, "The provider had an error (simulated).", type="server_error")
_NO_KEY = Refusal(401, "You did not provide an API key: send it as 'Authorization: Bearer KEY'.")
