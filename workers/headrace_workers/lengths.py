"""Learns how long answers are: notes answered calls, and adds them to the store's sketches once in a while.

What is learnt is for quotes: a worker that dies takes its last notes with it, and a busy one notes as many
calls as a small share of its time allows. Whether a call is noted does not depend on the call.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import timedelta

from headrace_shared.errors import InvalidRequest
from headrace_shared.fingerprints import fingerprints
from headrace_shared.jsonvalue import read_last
from headrace_shared.logs import Occasional
from headrace_shared.request import Endpoint
from headrace_shared.routes import Target
from headrace_shared.sketches import Collected, SketchKey
from headrace_shared.store import lengths
from headrace_shared.store.pool import UNREACHABLE, Database
from headrace_shared.usage import Usage

_occasionally = Occasional(logging.getLogger(__name__))

INTERVAL = timedelta(seconds=15)
"""Between two writings."""

BYTES_PER_SECOND = 100_000
"""Of bodies that are read; about one per cent of a processor. A call counts 1,000 beside its body."""

_CALL_BYTES = 1_000
_BURST_SECONDS = 2

ENOUGH = 5
"""A template is kept from so many calls on; before that it may be a prompt of its own."""

_MOST_TEMPLATES = 5_000


class Lengths:
    """The notes of one process."""

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._database = database
        self._clock = clock
        self._left = float(_BURST_SECONDS * BYTES_PER_SECOND)
        self._at = clock()
        self._noted: dict[SketchKey, Collected] = {}

    def note(self, target: Target, endpoint: Endpoint, body: bytes, usage: Usage) -> None:
        """Note what an answered call used, if there is time for it."""
        now = self._clock()
        self._left += (now - self._at) * BYTES_PER_SECOND
        self._left, self._at = min(self._left, _BURST_SECONDS * BYTES_PER_SECOND), now
        # A long body goes into debt rather than being passed over: those that are noted must be like all.
        if self._left <= 0:
            return
        self._left -= len(body) + _CALL_BYTES
        for template in ("", *_fingerprints(endpoint, body)):
            key = SketchKey(target.provider, target.model, template)
            collected = self._noted.get(key)
            if collected is None:
                if template and len(self._noted) >= _MOST_TEMPLATES:
                    continue
                collected = self._noted[key] = Collected()
            collected.add(usage, len(body))

    async def run(self) -> None:
        """Write until cancelled, and then once more."""
        try:
            while True:
                await asyncio.sleep(INTERVAL.total_seconds())
                await self._try_to_write()
        finally:
            await asyncio.shield(self._try_to_write())

    async def write(self) -> None:
        """Add to the store's sketches what is known of models, and of templates that came often enough."""
        ready = [key for key, noted in self._noted.items() if not key.template or noted.calls >= ENOUGH]
        # Taken out first: what is noted while they are written belongs to the next time.
        taken = {key: self._noted.pop(key).sketch() for key in ready}
        if len(self._noted) > _MOST_TEMPLATES // 2:
            self._noted.clear()
        if taken:
            await lengths.learn(self._database, taken)

    async def _try_to_write(self) -> None:
        try:
            await self.write()
        except UNREACHABLE as error:
            _occasionally.warning("what was learnt of answers is lost, PostgreSQL is away: %s", error)


def _fingerprints(endpoint: Endpoint, body: bytes) -> tuple[str, ...]:
    try:
        return fingerprints(endpoint, read_last(body))
    except InvalidRequest:
        return ()
