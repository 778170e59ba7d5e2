"""One hand on all clocks of a test: Postgres', Redis', and that of new ids."""

import hashlib
import time
from datetime import timedelta

from headrace_shared.dispatch.connection import Redis, Script
from headrace_shared.store.pool import Database

_ADVANCE = "return redis.call('INCRBY', 'headrace:clock', ARGV[1])"


class Clock:
    """Moves the time that the store, the dispatch and `headrace_shared.ids` go by."""

    def __init__(self, database: Database, redis: Redis) -> None:
        self._database = database
        self._redis = redis
        self.shift = timedelta(0)

    async def advance(self, duration: timedelta) -> None:
        """Let so much time pass at once."""
        self.shift += duration
        await self._database.execute("UPDATE headrace.clock SET shift = shift + $1", duration)
        await self._redis.evaluate(script(_ADVANCE), (), [duration // timedelta(milliseconds=1)])

    def time_ns(self) -> int:
        """What `time.time_ns` would say."""
        return time.time_ns() + self.shift // timedelta(microseconds=1) * 1000


def script(text: str) -> Script:
    """Return a script of a test's own."""
    return Script("test", text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())
