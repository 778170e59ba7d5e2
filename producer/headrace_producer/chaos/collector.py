"""Takes the spans of all processes, to be searched for what must not be in them."""

from types import TracebackType
from typing import Self

from aiohttp import web

from headrace_shared.testing.simulated_provider import listening_socket


class SpanCollector:
    """An OTLP endpoint that keeps the bodies it is sent, as they are."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.url = ""
        self._runner = web.ServerRunner(web.Server(self._handle, access_log=None), shutdown_timeout=1)

    async def __aenter__(self) -> Self:
        listening = listening_socket("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        await self._runner.setup()
        await web.SockSite(self._runner, listening).start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._runner.cleanup()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.bodies.append(await request.content.read())
        return web.Response(content_type="application/x-protobuf")
