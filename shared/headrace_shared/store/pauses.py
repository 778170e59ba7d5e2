"""What an operator keeps back by hand, as the store has it."""

from dataclasses import dataclass
from datetime import datetime, timedelta

import asyncpg

from headrace_shared.store.pool import Database
from headrace_shared.store.sql import Statements

_SQL = Statements("pauses.sql")


@dataclass(frozen=True, slots=True)
class Pause:
    """Jobs of this scope are not begun; a target is not called."""

    scope: str
    """`global`, `lane:NAME`, `tenant:NAME`, `model:NAME`, or `target:PROVIDER/MODEL` (a breaker)."""
    since: datetime
    until: datetime | None
    """None: until somebody resumes it."""
    left: timedelta | None
    """Until then, by the store's clock."""


async def pause(database: Database, scope: str, duration: timedelta | None) -> Pause:
    """Pause a scope from now on, for a time or (None) until it is resumed."""
    [row] = await database.fetch(_SQL["pause"], scope, duration.total_seconds() if duration else None)
    return _pause(row)


async def resume(database: Database, scope: str) -> bool:
    """End a pause; false when there was none."""
    row = await database.fetchrow(_SQL["resume"], scope)
    return row is not None and bool(row["in_force"])


async def in_force(database: Database) -> list[Pause]:
    """Return what is paused now, the oldest first."""
    return [_pause(row) for row in await database.fetch(_SQL["in_force"])]


def _pause(row: asyncpg.Record) -> Pause:
    until = row["until"]
    return Pause(row["scope"], row["since"], until, None if until is None else until - row["now"])
