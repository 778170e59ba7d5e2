"""Named statements out of `.sql` files.

A file is a list of blocks, each opened by a line ``-- name: claim_jobs``. Statements are
sent as they stand: parameters are bound, nothing is ever formatted into them.
"""

import re
from collections.abc import Iterator
from importlib.resources import files

_NAME = re.compile(r"^-- name: (\w+)$", re.MULTILINE)


class Statements:
    """The statements of one file of a package, by name."""

    def __init__(self, filename: str, package: str = "headrace_shared.store") -> None:
        text = files(package).joinpath(filename).read_text(encoding="utf-8")
        parts = _NAME.split(text)
        self._statements = {name: sql.strip() for name, sql in zip(parts[1::2], parts[2::2], strict=True)}

    def __getitem__(self, name: str) -> str:
        return self._statements[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._statements)
