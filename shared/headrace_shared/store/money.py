"""Budgets, the epoch of their counters, and what was spent, as the store has them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from uuid import UUID

import asyncpg
from pydantic import TypeAdapter

from headrace_shared.ids import BatchId, HoldId, JobId, Tenant, WorkerId
from headrace_shared.job import Queue
from headrace_shared.money import NanoUSD
from headrace_shared.store.jobs import queue_of, usage_of
from headrace_shared.store.pool import Database
from headrace_shared.store.sql import Statements
from headrace_shared.usage import Usage

_SQL = Statements("money.sql")

_WINDOWS_LAST = timedelta(days=40)
"""Longer than any window lasts that ends."""
_PAGE = 10_000


class WindowKind(StrEnum):
    TOTAL = "total"
    DAY = "day"
    WEEK = "week"
    """From Monday on."""
    MONTH = "month"


class BudgetPolicy(StrEnum):
    """What becomes of a job that does not fit."""

    WAIT = "wait"
    """Until money is released or the window turns; where it never turns the job fails."""
    REJECT = "reject"
    """It fails, unless calls under way may release enough."""
    DOWNGRADE = "downgrade"
    """Its call is made to the next target of its route that fits; where none does it waits."""
    SOFT = "soft"
    """It is counted and never refused."""


@dataclass(frozen=True, slots=True)
class BudgetState:
    """A budget and what the present window of it has used."""

    scope: str
    """As `scopes.parse_scope` reads it."""
    kind: WindowKind
    window: str
    limit: NanoUSD
    policy: BudgetPolicy
    settled: NanoUSD
    suspense: NanoUSD


@dataclass(frozen=True, slots=True)
class Window:
    kind: WindowKind
    name: str
    ends_in: float | None
    """Seconds; None for a window that never ends."""


@dataclass(frozen=True, slots=True)
class OpenHold:
    id: HoldId
    amount: NanoUSD
    scopes: tuple[str, ...]
    windows: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Counters:
    """What the counters of budgets are made of, as of one moment."""

    windows: tuple[Window, ...]
    budgets: tuple[BudgetState, ...]
    holds: tuple[OpenHold, ...]


_COUNTERS = TypeAdapter(Counters)


@dataclass(frozen=True, slots=True)
class Epoch:
    """Under which number money is held, and whether (degraded) it is held in the store."""

    number: int
    degraded: bool


@dataclass(frozen=True, slots=True)
class Refused:
    """A budget that has no room for a hold."""

    scope: str
    kind: WindowKind
    limit: NanoUSD
    missing: NanoUSD
    held_by_others: NanoUSD
    ends_in: timedelta | None
    """When the window turns; None for one that never does."""
    policy: BudgetPolicy
    epoch: int = field(default=0, compare=False)
    """Under which counters; 0 without Redis, where limits that change begin none."""


@dataclass(frozen=True, slots=True)
class UsageRow:
    """A part of the ledger, summed; the groupings that were not asked for are None."""

    model: str | None
    provider: str | None
    tenant: str | None
    endpoint: str | None
    calls: int
    answered: int
    usage: Usage
    cost: NanoUSD
    suspense: NanoUSD


async def set_budget(
    database: Database, scope: str, kind: WindowKind, limit: NanoUSD, policy: BudgetPolicy
) -> None:
    await database.execute(_SQL["set_budget"], scope, kind, limit, policy)


async def remove_budget(database: Database, scope: str, kind: WindowKind) -> bool:
    return await database.fetchrow(_SQL["remove_budget"], scope, kind) is not None


async def was_charged(database: Database, scope: str) -> bool:
    """Whether anything was ever spent, or stands in suspense, under a scope."""
    return await database.fetchrow(_SQL["was_charged"], scope) is not None


async def has_budget(database: Database, scope: str) -> bool:
    return await database.fetchrow(_SQL["has_budget"], scope) is not None


async def wake_waiters(database: Database, scope: str, *, limit: int) -> list[tuple[JobId, Queue]]:
    """Make jobs due that wait for a budget of a scope, so many at most; return them."""
    rows = await database.fetch(_SQL["wake_waiters"], scope, limit)
    return [(JobId(row["id"]), queue_of(row)) for row in rows]


async def wake(database: Database, ids: Sequence[JobId]) -> list[tuple[JobId, Queue]]:
    """Make those of the jobs due at once that wait for a budget; return them."""
    return [(JobId(row["id"]), queue_of(row)) for row in await database.fetch(_SQL["wake"], ids)]


async def raise_epoch(database: Database) -> int:
    """Begin a new epoch: from its commit on, no intent of an older one is accepted."""
    row = await database.fetchrow(_SQL["raise_epoch"])
    return int(row[0]) if row else 0


async def current_epoch(database: Database) -> int:
    return (await epoch_in_force(database)).number


async def epoch_in_force(database: Database) -> Epoch:
    row = await database.fetchrow(_SQL["epoch_in_force"])
    return Epoch(int(row["epoch"]), row["degraded"]) if row else Epoch(0, degraded=False)


async def degrade(database: Database, worker: WorkerId) -> bool:
    """Say that a worker does not reach Redis; true when the fleet does without it.

    An epoch without Redis is begun when no live worker reaches it, and ended by `raise_epoch`.
    """
    row = await database.fetchrow(_SQL["degrade"], worker)
    return bool(row and row[0])


async def hold(
    database: Database, epoch: int, wanted: Sequence[tuple[HoldId, NanoUSD, Sequence[str]]]
) -> list[datetime | Refused] | None:
    """Hold money in the store, for each over all of its scopes or not at all.

    Args:
        database: where.
        epoch: one without Redis.
        wanted: ids, amounts and scopes.

    Returns:
        for each the moment it is held since, or what it lacks; None when the epoch is not in force.

    """
    rows = await database.fetch(
        _SQL["hold"],
        epoch,
        [one[0] for one in wanted],
        [one[1] for one in wanted],
        ["\n".join(one[2]) for one in wanted],
    )
    return [_held_at(row) for row in rows] if rows or not wanted else None


def _held_at(row: asyncpg.Record) -> datetime | Refused:
    if row["by_scope"] is None:
        moment: datetime = row["at"]
        return moment
    return Refused(
        row["by_scope"],
        WindowKind(row["by_kind"]),
        NanoUSD(row["limit_is"]),
        NanoUSD(row["missing"]),
        NanoUSD(row["held_by_others"]),
        None if row["ends_in"] is None else timedelta(seconds=row["ends_in"]),
        BudgetPolicy(row["by_policy"]),
    )


async def release(database: Database, holds: Sequence[HoldId]) -> None:
    """Give up holds in the store; those that became intents are none any more."""
    await database.execute(_SQL["release"], holds)


async def release_old(database: Database, age: timedelta) -> None:
    """Give up holds in the store that are older than this: nobody can use them any more."""
    await database.execute(_SQL["release_old"], age.total_seconds())


async def held(database: Database) -> dict[tuple[str, str], NanoUSD]:
    """Return what each budget's present window holds, as the store has it, by scope and window."""
    rows = await database.fetch(_SQL["budget_use"])
    return {(row["scope"], row["window_name"]): NanoUSD(row["held_nano"]) for row in rows}


async def budget_state(database: Database) -> list[BudgetState]:
    return [
        BudgetState(
            row["scope"],
            WindowKind(row["window_kind"]),
            row["window_name"],
            NanoUSD(row["limit_nano"]),
            BudgetPolicy(row["policy"]),
            NanoUSD(row["settled_nano"]),
            NanoUSD(row["suspense_nano"]),
        )
        for row in await database.fetch(_SQL["budget_state"])
    ]


async def counters(database: Database) -> Counters:
    """Read what the counters are rebuilt from, in one snapshot."""
    row = await database.fetchrow(_SQL["counters"])
    return _COUNTERS.validate_json(row[0] if row else "{}")


async def forget_spend(database: Database, *, older_than: timedelta) -> None:
    """Delete the sums that no budget can need: of windows that ended before then, of batches that are gone.

    What was spent in total, by whomever, stays.
    """
    days = (older_than + _WINDOWS_LAST).days
    while await _count(database, "forget_windows", days, _PAGE) == _PAGE:
        pass
    while await _count(database, "forget_batches", _PAGE) == _PAGE:
        pass


async def _count(database: Database, name: str, *arguments: int) -> int:
    row = await database.fetchrow(_SQL[name], *arguments)
    return int(row[0]) if row else 0


@dataclass(frozen=True, slots=True)
class TimeZone:
    """In which zone windows are counted, and the one that will follow, if any."""

    name: str
    next: str | None
    next_since: datetime | None


async def time_zone(database: Database) -> TimeZone:
    row = await database.fetchrow(_SQL["time_zone"])
    return TimeZone(row["now"], row["name"], row["since"]) if row else TimeZone("UTC", None, None)


async def set_time_zone(database: Database, name: str) -> datetime | None:
    """Count windows in another time zone, and return since when; None when there is no such zone.

    The epoch is raised with it: whoever holds money counts anew before.
    """
    row = await database.fetchrow(_SQL["set_time_zone"], name)
    moment: datetime | None = row[0] if row else None
    return moment


async def usage(
    database: Database,
    *,
    by: Sequence[str] = (),
    tenant: Tenant | None = None,
    batch_id: BatchId | UUID | None = None,
) -> list[UsageRow]:
    """Sum the ledger, in one row or in one for each of the groups asked for.

    Args:
        database: where.
        by: any of `model`, `provider`, `tenant`, `endpoint`.
        tenant: only this tenant's.
        batch_id: only this batch's.

    """
    rows = await database.fetch(_SQL["usage"], list(by), tenant, batch_id)
    return [
        UsageRow(
            row["model"],
            row["provider"],
            row["tenant"],
            row["endpoint"],
            row["calls"],
            row["answered"],
            usage_of(row),
            NanoUSD(row["cost_nano"]),
            NanoUSD(row["suspense_nano"]),
        )
        for row in rows
    ]
