"""`headrace worker`: one worker process."""

import asyncio
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from headrace_shared import logs
from headrace_shared.errors import HeadraceError
from headrace_shared.servers import WEBHOOK_SECRET, configured_servers, nearest_webhook_secret
from headrace_shared.settings import Settings, load_settings

_EXIT_SECONDS = 5.0

_logger = logging.getLogger(__name__)


def worker(
    *,
    concurrency: Annotated[int | None, typer.Option(min=1, max=10_000, help="Jobs at a time.")] = None,
    lanes: Annotated[str | None, typer.Option(help="Lanes to serve, as interactive,default.")] = None,
    handlers: Annotated[
        list[str] | None,
        typer.Option(metavar="MODULE", help="With handlers of your own, as app.tasks; may be repeated."),
    ] = None,
    lease: Annotated[float | None, typer.Option(min=1, help="Seconds a dead worker keeps its jobs.")] = None,
    metrics_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port of /metrics, /healthz and /readyz.")
    ] = None,
    burst: Annotated[bool, typer.Option("--burst", help="Stop when no job is due.")] = False,
) -> None:
    """Run jobs until SIGTERM or Ctrl-C; then let running ones end, and give back the others.

    Its servers are those of HEADRACE_POSTGRES_URL and HEADRACE_REDIS_URL, else of the nearest running
    'headrace up'.
    """
    try:
        given = {
            "concurrency": concurrency,
            "lanes": lanes,
            "handlers": tuple(handlers) if handlers else None,
            "lease_seconds": lease,
            "metrics_port": metrics_port,
        }
        settings = load_settings(**{name: value for name, value in given.items() if value is not None})
        logs.configure()
        run(settings, burst=burst)
    except HeadraceError as error:
        typer.echo(f"headrace: {error}", err=True)
        raise typer.Exit(2) from None


def run(settings: Settings, *, burst: bool = False) -> None:
    """Run a worker in an event loop of its own, uvloop's where it is installed."""
    # What is left of a handler that ignores its cancellation would hold the process up for ever.
    giving_up = threading.Timer(_EXIT_SECONDS, _give_up)
    giving_up.daemon = True
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(_run(settings, burst=burst))
        giving_up.start()
    giving_up.cancel()


def _give_up() -> None:
    _logger.error("a handler does not end: the worker, which has ended its work, leaves without it")
    os._exit(0)


async def _run(settings: Settings, *, burst: bool) -> None:
    # Imported here, so that `headrace --help` does not load the SDKs.
    from headrace_workers.service import open_worker  # noqa: PLC0415

    async with configured_servers(settings) as servers:
        if not settings.postgres_url:
            _take_the_folders_secret()
        found = {"postgres_url": servers.postgres_url, "redis_url": servers.redis_url}
        async with open_worker(settings.model_copy(update=found), burst=burst) as worker:
            await worker.main()


def _take_the_folders_secret() -> None:
    """Sign callbacks as the workers of `headrace up` do, whose servers these are."""
    own = nearest_webhook_secret(Path.cwd())
    if own is not None:
        # Into the environment, for that is where the configuration, and processes of its own, look.
        os.environ.setdefault(WEBHOOK_SECRET, own)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop  # noqa: PLC0415
    except ImportError:
        return None
    return uvloop.new_event_loop
