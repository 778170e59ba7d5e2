"""Notices an event loop that stands still, and says what it stands in.

Code that does not give the loop back starves the heartbeat, and other workers take the jobs of
this one over. Nothing in the loop could say so; a thread can. It ends nothing: the leases do.
"""

# pyright: reportPrivateUsage=false
import asyncio
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from datetime import timedelta

_logger = logging.getLogger(__name__)

_PATIENCE = 3
"""A stall is reported when it has lasted for this part of the shortest lease."""

_CHECKS = 4
"""How often the loop is asked in that time."""

_FRAMES = 25


class Watchdog:
    """Asks a loop again and again for a sign of life, from a thread beside it.

    Args:
        loop: the loop of the thread that makes the watchdog.
        shortest_lease: what a stall is measured by.
        stalled: called in the loop, when it is back, after each stall that was reported.

    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        shortest_lease: Callable[[], timedelta],
        stalled: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._shortest_lease = shortest_lease
        self._stalled = stalled
        self._watched = threading.get_ident()
        self._ended = threading.Event()

    @contextmanager
    def watching(self) -> Generator[None]:
        """Watch until the end of the block."""
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()

    def _watch(self) -> None:
        while not self._ended.is_set():
            lease = self._shortest_lease().total_seconds()
            alive = threading.Event()
            asked = time.monotonic()
            with suppress(RuntimeError):  # the loop may be closed by now, and this thread is about to end
                self._loop.call_soon_threadsafe(alive.set)
            if not alive.wait(lease / _PATIENCE) and not self._ended.is_set():
                self._follow(alive, asked, lease)
            self._ended.wait(lease / _PATIENCE / _CHECKS)

    def _follow(self, alive: threading.Event, asked: float, lease: float) -> None:
        """Report a stall once when it is found, once when the leases are lost, once when it is over."""
        self._report(f"the event loop has stood still for {time.monotonic() - asked:.1f} s")
        if not alive.wait(max(0.0, asked + lease - time.monotonic())):
            self._report(
                "the event loop has stood still for a whole lease: its jobs are lost to other workers"
            )
        while not alive.wait(lease):
            if self._ended.is_set():
                return
        _logger.warning("the event loop is back after %.1f s", time.monotonic() - asked)
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._stalled)

    def _report(self, message: str) -> None:
        record = _logger.makeRecord(_logger.name, logging.WARNING, __file__, 0, message, (), None)
        record.stack_info = self._stack()
        _logger.handle(record)

    def _stack(self) -> str:
        """Return where the loop's thread is: files, lines and code, and no values."""
        frame = sys._current_frames().get(self._watched)  # noqa: SLF001 - documented, in spite of its name
        if frame is None:
            return ""
        return "It is here:\n" + "".join(traceback.format_stack(frame, limit=_FRAMES)).rstrip()
