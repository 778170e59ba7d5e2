"""The first reading of a file: every bad line is found, and the whole is quoted, before anything is saved."""

import asyncio
import gc
import random
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

from headrace_producer.batch.expecting import Quote
from headrace_producer.batch.files import BatchFile
from headrace_producer.batch.lines import BadLine, Format, read_requests
from headrace_producer.batch.quote import Quoter, Seen, nothing_seen
from headrace_producer.in_force import Snapshot
from headrace_shared.errors import InvalidBatchFile, InvalidInput

_TURN = 200
"""Lines that are checked before other tasks have their turn (about 10 ms)."""

_OBJECTS = 100_000
"""New objects after which garbage is looked for (some ten thousand lines)."""


@dataclass(frozen=True, slots=True)
class Survey:
    quote: Quote
    sample: frozenset[int]
    """Lines, chosen at random but the same each time; empty when none were asked for."""

    @property
    def total(self) -> int:
        return self.quote.requests


async def survey_file(
    file: BatchFile,
    form: Format,
    snapshot: Snapshot,
    *,
    seen: Seen = nothing_seen,
    sample: int = 0,
    seed: bytes = b"",
) -> Survey:
    """Check every line of a file and quote it.

    Raises:
        InvalidBatchFile: with every bad line.
        InvalidInput: the file has no requests.

    """
    quoter = Quoter(snapshot)
    chosen = _Sample(sample, seed)
    problems: list[tuple[int, str]] = []
    with _seldom_collecting():
        for index, found in enumerate(read_requests(file, form, snapshot)):
            if index % _TURN == 0:
                await asyncio.sleep(0)
            if isinstance(found, BadLine):
                problems.append((found.line, found.reason))
            elif not problems:
                quoter.add(found)
                if sample:
                    chosen.offer(found.line)
        if problems:
            raise InvalidBatchFile(path=str(file.path), problems=problems)
        quote = await quoter.quote(seen)
    if not quote.requests:
        raise InvalidInput(reason=f"{file.path} has no requests in it.")
    return Survey(quote, frozenset(chosen.lines))


_collecting_before: list[tuple[int, int, int]] = []
"""How often garbage was looked for when each of the surveys began that are under way."""


@contextmanager
def _seldom_collecting() -> Generator[None]:
    """Look for garbage seldom: what is kept of each line is none, and would be looked through every time."""
    before = gc.get_threshold()
    _collecting_before.append(before)
    gc.set_threshold(_OBJECTS, *before[1:])
    try:
        yield
    finally:
        # The threshold is the process's: of surveys that overlap, the last one to end puts back what was
        # there before the first.
        before = _collecting_before[0]
        _collecting_before.pop()
        if not _collecting_before:
            gc.set_threshold(*before)


class _Sample:
    """So many of all that are offered, each as likely as the others."""

    def __init__(self, size: int, seed: bytes) -> None:
        self._size = size
        self._random = random.Random(seed)  # noqa: S311 - a sample is no secret
        self._offered = 0
        self.lines: list[int] = []

    def offer(self, line: int) -> None:
        self._offered += 1
        if len(self.lines) < self._size:
            self.lines.append(line)
        elif (place := self._random.randrange(self._offered)) < self._size:
            self.lines[place] = line
