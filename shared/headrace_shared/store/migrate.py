"""Forward-only migrations, safe from many processes at once.

Each `migrations/NNNN_slug.sql` is applied once, in one transaction under an advisory
lock, and is recorded with its checksum. A file that was applied is never edited again:
the checksum is compared each time.
"""

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

from headrace_shared.errors import InvalidConfiguration, StoreNotMigrated

if TYPE_CHECKING:
    from headrace_shared.store.pool import Connection

_PREPARE = """
CREATE SCHEMA IF NOT EXISTS headrace;
CREATE TABLE IF NOT EXISTS headrace.migrations (
    version int PRIMARY KEY,
    name text NOT NULL,
    checksum text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
"""


@dataclass(frozen=True, slots=True)
class Migration:
    version: int
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        return hashlib.sha256(self.sql.encode()).hexdigest()


def migrations() -> list[Migration]:
    """Return all migrations of this code, in order."""
    found = [
        Migration(int(entry.name[:4]), entry.name.removesuffix(".sql"), entry.read_text(encoding="utf-8"))
        for entry in files("headrace_shared.store").joinpath("migrations").iterdir()
        if entry.name.endswith(".sql")
    ]
    return sorted(found, key=lambda migration: migration.version)


async def migrate(connection: "Connection", *, up_to: int | None = None) -> list[str]:
    """Apply what is missing and return the names of what was applied."""
    applied: list[str] = []
    for migration in migrations():
        if up_to is not None and migration.version > up_to:
            break
        async with connection.transaction():
            # The lock is taken before anything is looked at: a second process waits here
            # and then finds the work done.
            await connection.execute("SELECT pg_advisory_xact_lock(4850, 0)")
            await connection.execute(_PREPARE)
            if not await _is_applied(connection, migration):
                await connection.execute(migration.sql)
                await connection.execute(
                    "INSERT INTO headrace.migrations (version, name, checksum) VALUES ($1, $2, $3)",
                    migration.version,
                    migration.name,
                    migration.checksum,
                )
                applied.append(migration.name)
    return applied


async def _is_applied(connection: "Connection", migration: Migration) -> bool:
    checksum = await connection.fetchval(
        "SELECT checksum FROM headrace.migrations WHERE version = $1", migration.version
    )
    if checksum is not None and checksum != migration.checksum:
        raise InvalidConfiguration(
            where=migration.name, reason="was applied to this database with another content than it has now"
        )
    return checksum is not None


async def schema_version(connection: "Connection") -> int:
    """Return the newest applied version, 0 for a database without Headrace."""
    if await connection.fetchval("SELECT to_regclass('headrace.migrations') IS NULL"):
        return 0
    version: int = await connection.fetchval("SELECT coalesce(max(version), 0) FROM headrace.migrations")
    return version


async def check(connection: "Connection") -> None:
    """Raise StoreNotMigrated unless the schema is at least what this code needs.

    A newer schema is fine: migrations only ever add what older code can ignore.
    """
    found, needed = await schema_version(connection), migrations()[-1].version
    if found < needed:
        raise StoreNotMigrated(found=found, needed=needed)
