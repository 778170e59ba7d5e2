"""What a spending process has been billed, in a file that outlives it however it ends."""

import mmap
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

SCOPES: tuple[tuple[str, ...], ...] = (
    ("global", "tenant:a", "key:ci", "model:m", "batch:01a1fd00-06fc-7a5b-9a04-371f4f41bcbf"),
    ("global", "tenant:a", "key:web", "model:n", "tag:x", "tag:y"),
    ("global", "tenant:b", "key:ci", "model:m", "tag:y"),
    ("global", "tenant:b", "model:n", "tag:counted"),
)
"""Overlapping: what different jobs spend from."""

_NAMES = ("operations", *sorted({scope for scopes in SCOPES for scope in scopes}))
_PLACES = {name: 8 * place for place, name in enumerate(_NAMES)}
_SIZE = 8 * len(_NAMES)


class Tally:
    """Counters of one process, in shared memory: killed or not, they say what it did."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a tally for writing; it begins at nothing."""
        path.write_bytes(bytes(_SIZE))
        with path.open("r+b") as file:
            return cls(mmap.mmap(file.fileno(), _SIZE))

    def count(self, operations: int) -> None:
        self._add("operations", operations)

    def bill(self, scopes: Sequence[str], amount: int) -> None:
        for scope in scopes:
            self._add(scope, amount)

    def _add(self, name: str, amount: int) -> None:
        place = _PLACES[name]
        (before,) = struct.unpack_from("<q", self._memory, place)
        struct.pack_into("<q", self._memory, place, before + amount)


def read(paths: Iterable[Path]) -> Counter[str]:
    """Add up tallies: `operations`, and what was billed by scope."""
    total: Counter[str] = Counter()
    for path in paths:
        written = path.read_bytes() if path.exists() else b""
        if len(written) == _SIZE:
            total.update(dict(zip(_NAMES, struct.unpack(f"<{len(_NAMES)}q", written), strict=True)))
    return total
