"""What an orchestrator and Prometheus ask a worker over HTTP."""

import asyncio
import logging
from collections.abc import Callable
from types import TracebackType
from typing import Self

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from headrace_shared.errors import InvalidConfiguration
from headrace_shared.settings import Settings

_logger = logging.getLogger(__name__)

_SHUTDOWN_SECONDS = 1.0


class Probes:
    """Answers ``/healthz``, ``/readyz`` and ``/metrics`` while it is entered; off without a metrics port.

    ``/healthz`` says that the process's event loop turns, and asks no other server: restarting
    a worker mends none of them.

    Args:
        settings: host and port; port 0 takes a free one.
        ready: None when the worker takes jobs, else why not.
        registry: what ``/metrics`` shows.

    """

    def __init__(
        self,
        settings: Settings,
        ready: Callable[[], str | None],
        registry: CollectorRegistry | None = None,
    ) -> None:
        self._host = settings.metrics_host
        self._port = settings.metrics_port
        self._ready = ready
        self._registry = registry
        self._runner: web.AppRunner | None = None

    @property
    def port(self) -> int | None:
        """The port that is listened on; None while there is none."""
        addresses = self._runner.addresses if self._runner else []
        return int(addresses[0][1]) if addresses else None

    async def __aenter__(self) -> Self:
        """Begin to listen.

        Raises:
            InvalidConfiguration: the address cannot be listened on.

        """
        if self._port is None:
            return self
        app = web.Application()
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._metrics)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=_SHUTDOWN_SECONDS)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._host, self._port).start()
        except OSError as error:
            await self._close()
            raise InvalidConfiguration(
                where="HEADRACE_METRICS_PORT",
                reason=f"{self._host} port {self._port} cannot be listened on ({error.strerror})",
            ) from error
        _logger.info("metrics and probes on http://%s:%d", self._host, self.port)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._close()

    async def _close(self) -> None:
        if self._runner is not None:
            runner, self._runner = self._runner, None
            await runner.cleanup()

    async def _healthz(self, _request: web.Request) -> web.Response:
        return _text(200, "alive")

    async def _readyz(self, _request: web.Request) -> web.Response:
        reason = self._ready()
        return _text(200, "ready") if reason is None else _text(503, reason)

    async def _metrics(self, request: web.Request) -> web.Response:
        if self._registry is None:
            return _text(404, "there are no metrics")
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        # Thousands of series take many milliseconds to write out: not those of the event loop.
        page = await asyncio.to_thread(encode, self._registry)
        return web.Response(body=page, headers={"Content-Type": content_type})


def _text(status: int, text: str) -> web.Response:
    return web.Response(status=status, text=f"{text}\n", headers={"Cache-Control": "no-store"})
