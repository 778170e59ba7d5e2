"""What an examination finds: one sentence for each thing that was looked at."""

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    check: str
    """What was looked at: `redis persistence`, `postgres clock`, ..."""
    level: Level
    says: str
    """One sentence; where it is not well, it says what would be."""


def ok(check: str, says: str) -> Finding:
    return Finding(check, Level.OK, says)


def warning(check: str, says: str) -> Finding:
    return Finding(check, Level.WARNING, says)


def problem(check: str, says: str) -> Finding:
    return Finding(check, Level.PROBLEM, says)


def cannot_tell(check: str, what: str) -> Finding:
    return warning(check, f"Cannot tell {what}: the server does not let this user ask.")
