"""The names of calls that a handler gave none."""

from collections import Counter
from collections.abc import Iterable
from heapq import heapify, heappop

MARK = "#"
"""What they begin with: no name of a caller's does."""


class Unnamed:
    """Names the unnamed calls of one run.

    An answer that is there is given before anything is asked anew: which of several equal calls it
    was that failed or was broken off in an earlier run makes no difference to this one.

    Args:
        answered: the names and digests of the calls that earlier runs were answered.

    """

    def __init__(self, answered: Iterable[tuple[str, bytes]]) -> None:
        self._answered: dict[bytes, list[int]] = {}
        for name, digest in answered:
            if name.startswith(MARK):
                self._answered.setdefault(digest, []).append(int(name.rpartition("-")[2]))
        self._taken = {digest: frozenset(numbers) for digest, numbers in self._answered.items()}
        for numbers in self._answered.values():
            heapify(numbers)
        self._fresh = Counter[bytes]()

    def take(self, digest: bytes) -> str:
        """Return the name of the next call of this digest."""
        # Not a running number of all calls: calls side by side begin in another order each time.
        return f"{MARK}{digest.hex()[:8]}-{self._number(digest)}"

    def _number(self, digest: bytes) -> int:
        if answered := self._answered.get(digest):
            return heappop(answered)
        self._fresh[digest] += 1
        while self._fresh[digest] in self._taken.get(digest, frozenset()):
            self._fresh[digest] += 1
        return self._fresh[digest]
