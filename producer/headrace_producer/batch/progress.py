"""The progress of a submission: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from types import TracebackType
from typing import Protocol

import typer
from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from headrace_producer.batch.following import Standing
from headrace_producer.console import dollars, in_words, plain

_SECONDS_BETWEEN_LINES = 10.0


class View(Protocol):
    """Shows how far something is."""

    def begin(self, phase: str) -> None:
        """Show that something has begun whose length is not known."""
        ...

    def show(self, phase: str, done: int, total: int, facts: str = "") -> None:
        """Show that so much of a phase is done."""
        ...

    def tell(self, text: str) -> None:
        """Say something beside it."""
        ...


class Progressing:
    """A view for as long as it is entered; standard error carries it."""

    def __init__(self) -> None:
        self._console = RichConsole(stderr=True, highlight=False, markup=False)
        self._bar: Progress | None = None

    def __enter__(self) -> View:
        if not sys.stderr.isatty():
            return Lines()
        self._bar = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[facts]}"),
            console=self._console,
            transient=True,
        )
        self._bar.start()
        return Bar(self._bar)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


class Bar:
    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=None, facts="")

    def begin(self, phase: str) -> None:
        self._bar.update(self._task, description=phase, total=None)

    def show(self, phase: str, done: int, total: int, facts: str = "") -> None:
        description = f"{phase} {done:,}/{total:,}"
        self._bar.update(self._task, description=description, completed=done, total=total, facts=facts)

    def tell(self, text: str) -> None:
        self._bar.console.print(plain(text))


class Lines:
    """A line when a phase begins, every ten seconds, and when it is done."""

    def __init__(self) -> None:
        self._phase = ""
        self._due = 0.0
        self._last: str = ""

    def begin(self, phase: str) -> None:
        """Say nothing: there is a line when it is done."""

    def show(self, phase: str, done: int, total: int, facts: str = "") -> None:
        now = time.monotonic()
        line: str = f"{phase} {done:,}/{total:,}{'  ' if facts else ''}{facts}"
        if (phase != self._phase or now >= self._due or done >= total) and line != self._last:
            typer.echo(line, err=True)
            self._phase, self._last, self._due = phase, line, now + _SECONDS_BETWEEN_LINES

    def tell(self, text: str) -> None:
        typer.echo(plain(text), err=True)


def facts_of(standing: Standing) -> str:
    """Write what there is to say about a running batch."""
    progress, cost = standing.progress, standing.cost
    facts = [f"{progress.failed:,} failed"]
    if progress.retried:
        facts.append(f"{progress.retried:,} retried")
    if standing.per_second:
        facts.append(f"{standing.per_second:,.1f} jobs/s")
    facts.append(f"{_short(cost.prompt_tokens + cost.completion_tokens)} tokens")
    facts.append(dollars(cost.cost))
    if cost.suspense:
        facts.append(f"{dollars(cost.suspense)} in suspense")
    if standing.left is not None and not standing.finished:
        facts.append(f"{in_words(standing.left)} left")
    return " · ".join(facts)


def _short(number: int) -> str:
    for divisor, letter in ((1_000_000, "M"), (1000, "k")):
        if number >= divisor:
            return f"{number / divisor:.1f}{letter}"
    return str(number)
