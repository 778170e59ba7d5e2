"""The configuration in versions: what `headrace config apply` writes and everybody reads."""

import json
from dataclasses import dataclass
from datetime import datetime

from headrace_shared.configuration import Configuration
from headrace_shared.errors import ConfigurationChanged
from headrace_shared.store.pool import Database, Pool
from headrace_shared.store.sql import Statements

_SQL = Statements("configurations.sql")


@dataclass(frozen=True, slots=True)
class Versioned:
    """A configuration and its version; version 0 is the built-in one."""

    version: int
    configuration: Configuration


@dataclass(frozen=True, slots=True)
class Applied:
    version: int
    changed: bool


@dataclass(frozen=True, slots=True)
class Entry:
    version: int
    source: str
    applied_at: datetime


async def current(database: Database) -> Versioned:
    """Return the configuration that is in force."""
    row = await database.fetchrow(_SQL["current_configuration"])
    if row is None:
        return Versioned(0, Configuration.default())
    return Versioned(row["version"], Configuration.from_document(json.loads(row["document"])))


async def get(database: Database, version: int) -> Configuration | None:
    row = await database.fetchrow(_SQL["get_configuration"], version)
    return Configuration.from_document(json.loads(row["document"])) if row else None


async def apply(pool: Pool, configuration: Configuration, source: str, *, over: int | None = None) -> Applied:
    """Put a configuration in force, unless it says what the present one says.

    Args:
        pool: where.
        configuration: what is to hold.
        source: who says so, for the history.
        over: the version it was made of; None where it is not made of one.

    Raises:
        ConfigurationChanged: another version than `over` is in force by now; nothing was changed.

    """
    document = json.dumps(configuration.document())
    async with pool.acquire() as connection, connection.transaction():
        # One at a time, and what is compared was committed before: a statement of its own.
        await connection.execute(_SQL["lock_configurations"])
        row = await connection.fetchrow(_SQL["apply_configuration"], document, source, over)
    before: int = row["before"] if row else 0
    if over is not None and before != over:
        raise ConfigurationChanged(read=over, present=before)
    return Applied(row["version"], row["changed"]) if row else Applied(0, changed=False)


async def history(database: Database, *, limit: int = 50) -> list[Entry]:
    """Return the newest versions, newest first."""
    rows = await database.fetch(_SQL["list_configurations"], limit)
    return [Entry(row["version"], row["source"], row["applied_at"]) for row in rows]
