"""What the command line says, and where: results to standard output, all else to standard error."""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_UP, Decimal

import typer
from rich.console import Console as RichConsole
from rich.table import Table
from rich.text import Text

from headrace_producer.words import count, in_words
from headrace_shared.money import NANO_PER_USD, NanoUSD, to_usd

__all__ = ["Console", "count", "dollars", "in_words", "plain"]

_CONTROLS = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor, screen
    r"|\x1b[\]PX^_].*?(?:\x07|\x1b\\|\Z)"  # strings: titles, links, the clipboard
    r"|\x1b[ -/]*[0-~]?"
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
    r"|[\u200e\u200f\u202a-\u202e\u2066-\u2069]",  # the direction of text
    re.DOTALL,
)


def plain(text: str) -> str:
    """Return foreign text without anything that a terminal would obey."""
    return _CONTROLS.sub("", text)


@dataclass(frozen=True, slots=True)
class Console:
    """One command's way to its user."""

    as_json: bool = False

    def say(self, text: str) -> None:
        """Print what was asked for."""
        if not self.as_json:
            typer.echo(plain(text))

    def note(self, text: str) -> None:
        """Print what is good to know."""
        typer.echo(plain(text), err=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print rows below their columns' names; all but the first column are aligned to the right."""
        if self.as_json:
            return
        table = Table(box=None, pad_edge=False, header_style="bold")
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if index else "left", no_wrap=True)
        for row in rows:
            table.add_row(*(Text(plain(cell)) for cell in row))
        width = None if sys.stdout.isatty() else 10_000
        RichConsole(width=width, highlight=False, markup=False).print(table)

    def conclude(self, answer: Mapping[str, object]) -> None:
        """Print the JSON object that ends a command's output."""
        if self.as_json:
            typer.echo(json.dumps(answer))

    def write(self, data: bytes, /) -> None:
        """Write answers to standard output, byte for byte unless that is a terminal."""
        if self.as_json:
            return
        if sys.stdout.isatty():
            data = plain(data.decode(errors="replace")).encode()
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


def dollars(amount: NanoUSD) -> str:
    """Write an amount for a quick look, rounded up; a bill is written by `format_usd`.

    >>> dollars(NanoUSD(1_234_567_890)), dollars(NanoUSD(12_345))
    ('$1.24', '$0.0001')
    """
    places = Decimal("0.01") if amount >= NANO_PER_USD or not amount else Decimal("0.0001")
    return f"${to_usd(amount).quantize(places, rounding=ROUND_UP):,}"
