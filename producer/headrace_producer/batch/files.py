"""An input file: opened once, read several times, and always the same."""

import hashlib
import json
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, Self, cast

from headrace_shared.errors import InvalidInput

STANDARD_INPUT = Path("-")

_PIECE = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class RawLine(NamedTuple):
    number: int
    """From 1, as an editor counts."""
    data: bytes | None
    """None: longer than was asked for; the rest of it was passed over."""


class BatchFile:
    """A file that is read line by line, as often as needed, in constant memory.

    What can be read only once (a pipe, or ``-`` for standard input) is copied to a temporary
    file first.

    Raises:
        InvalidInput: it cannot be read, or it changed between two readings.

    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = "standard input" if path == STANDARD_INPUT else path.name
        self._stack = ExitStack()
        self._stream: BinaryIO
        self._seen: tuple[int, int] | None = None

    def __enter__(self) -> Self:
        try:
            self._stream = self._open()
        except OSError as error:
            self._stack.close()
            raise self._unreadable(error) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def digest(self, *settings: str) -> bytes:
        """Return the SHA-256 of the content, and of what is made of it where that is a choice."""
        digest = hashlib.sha256()
        for piece in self._pieces():
            digest.update(piece)
        if settings:
            digest.update(b"\0" + json.dumps(settings).encode())
        return digest.digest()

    def stream(self) -> BinaryIO:
        """Return the file at its beginning."""
        self._rewind()
        if self._stream.read(len(_BYTE_ORDER_MARK)) != _BYTE_ORDER_MARK:
            self._stream.seek(0)
        return self._stream

    def lines(self, *, longest: int) -> Iterator[RawLine]:
        """Go through the lines, without their ends; empty ones are passed over."""
        stream = self.stream()
        number = 0
        while line := self._readline(stream, longest + 1):
            number += 1
            ended = line.endswith(b"\n")
            whole = ended or len(line) <= longest
            while not ended and (rest := self._readline(stream, _PIECE)):
                ended = rest.endswith(b"\n")
            if not (whole and line.isspace()):
                yield RawLine(number, line.rstrip(b"\r\n") if whole else None)

    def _readline(self, stream: BinaryIO, size: int) -> bytes:
        try:
            return stream.readline(size)
        except OSError as error:
            raise self._unreadable(error) from None

    def _open(self) -> BinaryIO:
        if self.path == STANDARD_INPUT:
            return self._copy(sys.stdin.buffer)
        stream = self._stack.enter_context(self.path.open("rb"))
        return stream if stat.S_ISREG(os.fstat(stream.fileno()).st_mode) else self._copy(stream)

    def _copy(self, source: BinaryIO) -> BinaryIO:
        # The stack closes it with the file itself.
        copy = cast("BinaryIO", self._stack.enter_context(tempfile.TemporaryFile()))  # noqa: SIM115
        while piece := source.read(_PIECE):
            copy.write(piece)
        copy.flush()
        return copy

    def _pieces(self) -> Iterator[bytes]:
        self._rewind()
        try:
            while piece := self._stream.read(_PIECE):
                yield piece
        except OSError as error:
            raise self._unreadable(error) from None

    def _rewind(self) -> None:
        status = os.fstat(self._stream.fileno())
        now = status.st_size, status.st_mtime_ns
        if self._seen not in (None, now):
            raise InvalidInput(reason=f"{self.path} changed while it was read: submit it again.")
        self._seen = now
        self._stream.seek(0)

    def _unreadable(self, error: OSError) -> InvalidInput:
        return InvalidInput(reason=f"{self.path} cannot be read: {error.strerror or error}.")
