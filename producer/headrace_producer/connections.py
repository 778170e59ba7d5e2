"""What the command line holds open while it works: the way to both servers."""

from collections.abc import AsyncGenerator, Generator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass

from headrace_producer.announcing import Announcer
from headrace_producer.console import Console
from headrace_shared.dispatch.connection import Redis
from headrace_shared.dispatch.dispatch import Dispatch
from headrace_shared.errors import DispatchUnavailable
from headrace_shared.servers import configured_servers
from headrace_shared.settings import Settings
from headrace_shared.store.pool import Pool, address, open_pool


@dataclass(frozen=True, slots=True)
class Connections:
    settings: Settings
    pool: Pool
    address: str
    """Of Postgres, for messages."""
    redis: Redis
    announcer: Announcer


@asynccontextmanager
async def open_connections(settings: Settings) -> AsyncGenerator[Connections]:
    """Connect to the servers as a client does; Redis may be away until it is needed.

    Raises:
        MissingSetting: nothing says where the servers are.
        StoreError: Postgres is away, too old, or not migrated.

    """
    async with AsyncExitStack() as stack:
        servers = await stack.enter_async_context(configured_servers(settings))
        pool = await open_pool(servers.postgres_url, size=4, pooler=settings.pooler)
        stack.push_async_callback(pool.close)
        redis = Redis(servers.redis_url)
        stack.push_async_callback(redis.close)
        yield Connections(settings, pool, address(servers.postgres_url), redis, Announcer(Dispatch(redis)))


@contextmanager
def redis_may_be_away(console: Console) -> Generator[None]:
    """What is written down in Postgres holds; workers hear of it when Redis is back."""
    try:
        yield
    except DispatchUnavailable as error:
        console.note(f"Workers hear of it later: {error.message}")
