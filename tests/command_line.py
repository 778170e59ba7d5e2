"""The command line as a test calls it."""

import asyncio
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from headrace_producer import cli

BODY = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello"}]}


@dataclass(frozen=True, slots=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def answer(self) -> dict[str, object]:
        """The JSON object on the last line."""
        last: dict[str, object] = json.loads(self.out.splitlines()[-1])
        return last

    def rows(self, name: str) -> list[dict[str, object]]:
        """A list in that object."""
        rows: list[dict[str, object]] = json.loads(self.out.splitlines()[-1])[name]
        return rows


class Command:
    """Runs `headrace` in a folder of the test's own."""

    def __init__(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        self._capsys = capsys
        self.folder = folder

    async def __call__(self, *arguments: object) -> Done:
        code = await asyncio.to_thread(cli.run, [str(argument) for argument in arguments])
        captured = self._capsys.readouterr()
        return Done(code, captured.out, captured.err)

    async def submit(self, count: int, *options: object) -> Done:
        """Submit so many requests as a batch; the same number is the same content."""
        path = write_requests(self.folder / f"requests-{count}.jsonl", count)
        return await self("submit", path, *options)

    def read(self, name: str) -> Sequence[dict[str, object]]:
        """Read the lines of a JSONL file."""
        return [json.loads(line) for line in (self.folder / name).read_bytes().splitlines()]


def write_requests(path: Path, count: int) -> Path:
    """Write the lines of a batch; return where they are."""
    path.write_text("".join(_lines(count)))
    return path


def _lines(count: int) -> Iterator[str]:
    for number in range(1, count + 1):
        row = {"custom_id": f"row-{number}", "method": "POST", "url": "/v1/chat/completions", "body": BODY}
        yield json.dumps(row) + "\n"
