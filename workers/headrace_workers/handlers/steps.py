"""The steps of one handler's run that are under way."""

import asyncio
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta

PATIENCE = timedelta(minutes=5)
"""How long the end of a run waits for its steps: one may itself wait for what the end broke off."""

_inside = ContextVar("inside_a_step", default=False)


class Steps:
    """Counts them, so that none is lost that would have come to something."""

    def __init__(self) -> None:
        self._under_way: set[asyncio.Future[None]] = set()

    @contextmanager
    def one(self) -> Generator[None]:
        """Be a step, until its result is kept."""
        over = asyncio.get_running_loop().create_future()
        self._under_way.add(over)
        before = _inside.get()
        _inside.set(True)
        try:
            yield
        finally:
            _inside.set(before)
            self._under_way.discard(over)
            over.set_result(None)

    async def until_over(self) -> None:
        """Wait for all steps that are under way, but from inside of a step for none."""
        # A step would wait for itself, and two for each other: the rest is waited for when it is over.
        if self._under_way and not _inside.get():
            await asyncio.wait(self._under_way, timeout=PATIENCE.total_seconds())
