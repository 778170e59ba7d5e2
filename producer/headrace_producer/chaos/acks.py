"""What a producer was promised: a file that is only appended to, so that no kill can take a line back."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

from pydantic import BaseModel, ConfigDict, ValidationError


class Line(BaseModel):
    """One thing that happened; the field that is set says what."""

    model_config = ConfigDict(frozen=True)

    key: str
    asked: int | None = None
    """The number of the ask; written before it is sent."""
    job: UUID | None = None
    """The job that was acked; written before anything else is done with it."""
    refused: str | None = None
    """The error that says that there will be no job."""
    cancelled: bool | None = None
    """What the cancellation of the key's job was answered."""


class AckFile:
    """Appends lines, each in one write."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def write(self, *lines: Line) -> None:
        text = "".join(f"{line.model_dump_json(exclude_none=True)}\n" for line in lines)
        os.write(self._descriptor, text.encode())

    def close(self) -> None:
        os.close(self._descriptor)


@dataclass(slots=True)
class Promises:
    """What all lines of one or more files come to."""

    asked: dict[str, int] = field(default_factory=dict[str, int])
    acked: dict[str, set[UUID]] = field(default_factory=dict[str, set[UUID]])
    """Every job that was ever acked for a key; one, if all is well."""
    refused: dict[str, str] = field(default_factory=dict[str, str])
    cancels: int = 0

    @property
    def acks(self) -> int:
        return len(self.acked)

    @property
    def unresolved(self) -> list[str]:
        """Keys that were asked for and never answered: nothing is promised for them."""
        return [key for key in self.asked if key not in self.acked and key not in self.refused]

    def note(self, line: Line) -> None:
        if line.asked is not None:
            self.asked[line.key] = line.asked
        if line.job is not None:
            self.acked.setdefault(line.key, set()).add(line.job)
        if line.refused is not None:
            self.refused[line.key] = line.refused
        self.cancels += line.cancelled is not None


def read(paths: Iterable[Path]) -> Promises:
    """Read files back; a last line that a kill cut short says nothing."""
    promises = Promises()
    for path in paths:
        for text in path.read_text().splitlines() if path.exists() else ():
            try:
                promises.note(Line.model_validate_json(text))
            except ValidationError:
                continue
    return promises
