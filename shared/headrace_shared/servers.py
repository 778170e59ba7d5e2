"""Where the servers are: as the caller says, as the environment says, or the nearest embedded ones."""

import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import TypeAlias

from headrace_shared import embedded
from headrace_shared.embedded import EmbeddedServers
from headrace_shared.settings import Settings
from headrace_shared.store import migrate
from headrace_shared.store.pool import connect

WEBHOOK_SECRET = "HEADRACE_WEBHOOK_SECRET"  # noqa: S105 - its name
"""The variable that a default configuration reads the master secret of callbacks from."""

_SECRET_FILE = Path(".headrace") / "webhook.secret"

FindServers: TypeAlias = Callable[[], AbstractAsyncContextManager[EmbeddedServers]]


@asynccontextmanager
async def configured_servers(settings: Settings) -> AsyncGenerator[EmbeddedServers]:
    """The servers that the settings name; without any, those of the nearest live `.headrace/`.

    Raises:
        MissingSetting: there are neither, or one URL is set and the other is not.

    """
    if settings.postgres_url or settings.redis_url:
        yield EmbeddedServers(settings.require_postgres(), settings.require_redis())
        return
    async with embedded.join(Path.cwd()) as running:
        yield running or EmbeddedServers(settings.require_postgres(), settings.require_redis())


@asynccontextmanager
async def own_servers(directory: Path) -> AsyncGenerator[EmbeddedServers]:
    """Embedded servers, started unless they run, with the schema of this code."""
    async with embedded.embedded_servers(directory) as servers:
        connection = await connect(servers.postgres_url)
        try:
            await migrate.migrate(connection)
        finally:
            await connection.close()
        yield servers


def own_webhook_secret(directory: Path) -> str:
    """Return the master secret of a folder's callbacks, made when it is first asked for."""
    path = directory / _SECRET_FILE
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(secrets.token_urlsafe(32), encoding="ascii")
    return path.read_text(encoding="ascii")


def nearest_webhook_secret(start: Path) -> str | None:
    """Return the master secret of the nearest folder, upwards, that has one."""
    for folder in (start.resolve(), *start.resolve().parents):
        if (folder / _SECRET_FILE).is_file():
            return own_webhook_secret(folder)
    return None
