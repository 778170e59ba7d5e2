"""What the demo shows while it runs: a live bar on a terminal, plain lines elsewhere."""

import time
from contextlib import suppress
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from headrace_producer.demo.ledger import Progress as Standing
from headrace_shared.money import format_usd

_LINE_SECONDS = 2.0
_RATE_SECONDS = 3.0


class Screen:
    """Prints what happens at once, and how far the jobs are now and then."""

    def __init__(self, *, stderr: bool = False) -> None:
        self.console = Console(stderr=stderr, highlight=False, soft_wrap=True)
        self.started = time.monotonic()
        self._rate = Rate()
        self._last_line = 0.0
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._over = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop_bar()

    def event(self, text: str, style: str = "") -> None:
        """Print a line with the time since the beginning."""
        line = Text(f"{time.monotonic() - self.started:6.1f} s  ", style="dim")
        line.append(text, style=style)
        self.console.print(line)

    def show(self, what: RenderableType) -> None:
        self.console.print(what)

    def progress(self, now: Standing) -> None:
        """Show how far the jobs are, until `stop_bar`."""
        if self._over:
            return
        rate = self._rate.of(now.ended)
        text = _sentence(now, rate)
        if not self.console.is_terminal:
            if time.monotonic() - self._last_line >= _LINE_SECONDS:
                self._last_line = time.monotonic()
                self.event(f"{now.ended:>5,}/{now.total:,} {text}")
            return
        if self._bar is None or self._task is None:
            columns = (BarColumn(24), TextColumn("{task.completed:,}/{task.total:,} {task.description}"))
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task(text, total=now.total)
            self._bar.start()
        self._bar.update(self._task, completed=now.ended, total=now.total, description=text)

    def stop_bar(self) -> None:
        self._over = True
        if self._bar is not None:
            with suppress(OSError):
                self._bar.stop()
            self._bar = None


class Rate:
    """Jobs per second over the last few seconds."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, int]] = []

    def of(self, ended: int) -> float:
        now = time.monotonic()
        self._seen.append((now, ended))
        self._seen = [one for one in self._seen if one[0] >= now - _RATE_SECONDS]
        before, count = self._seen[0]
        return (ended - count) / (now - before) if now > before else 0.0


def _sentence(now: Standing, rate: float) -> str:
    left = now.total - now.ended
    eta = f"ETA {left / rate:.0f} s" if rate >= 1 and left else "ETA -" if left else "done"
    return (
        f"failed {now.failed}, retried {now.retried}, {rate:.0f} jobs/s, {now.tokens:,} tokens, "
        f"{format_usd(now.cost)}, {eta}"
    )
