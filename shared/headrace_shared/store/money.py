"""Budgets, the epoch of their counters, and what was spent, as the store has them."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from uuid import UUID

from pydantic import TypeAdapter

from headrace_shared.ids import BatchId, HoldId, JobId, Tenant
from headrace_shared.job import Queue
from headrace_shared.money import NanoUSD
from headrace_shared.store.jobs import queue_of, usage_of
from headrace_shared.store.pool import Database
from headrace_shared.store.sql import Statements
from headrace_shared.usage import Usage

_SQL = Statements("money.sql")


class WindowKind(StrEnum):
    TOTAL = "total"
    DAY = "day"
    MONTH = "month"


class BudgetPolicy(StrEnum):
    """What becomes of a job that does not fit."""

    WAIT = "wait"
    REJECT = "reject"


@dataclass(frozen=True, slots=True)
class BudgetState:
    """A budget and what the present window of it has used."""

    scope: str
    """`global` or `tenant:NAME`."""
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


@dataclass(frozen=True, slots=True)
class SuspenseRow:
    job_id: JobId
    run: int
    call: int
    tenant: str
    provider: str
    model: str
    reason: str | None
    amount: NanoUSD
    since: datetime


async def set_budget(
    database: Database, scope: str, kind: WindowKind, limit: NanoUSD, policy: BudgetPolicy
) -> None:
    await database.execute(_SQL["set_budget"], scope, kind, limit, policy)


async def remove_budget(database: Database, scope: str, kind: WindowKind) -> bool:
    return await database.fetchrow(_SQL["remove_budget"], scope, kind) is not None


async def wake_waiters(database: Database, scope: str, *, limit: int) -> list[tuple[JobId, Queue]]:
    """Make jobs due that wait for a budget of a scope, so many at most; return them."""
    rows = await database.fetch(_SQL["wake_waiters"], scope, limit)
    return [(JobId(row["id"]), queue_of(row)) for row in rows]


async def raise_epoch(database: Database) -> int:
    """Begin a new epoch: from its commit on, no intent of an older one is accepted."""
    row = await database.fetchrow(_SQL["raise_epoch"])
    return int(row[0]) if row else 0


async def current_epoch(database: Database) -> int:
    row = await database.fetchrow(_SQL["current_epoch"])
    return int(row[0]) if row else 0


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


async def suspense(database: Database, *, limit: int = 1000) -> list[SuspenseRow]:
    """List the calls that nobody knows to have been billed or not, oldest first."""
    return [
        SuspenseRow(
            JobId(row["job_id"]),
            row["run"],
            row["call"],
            row["tenant"],
            row["provider"],
            row["model"],
            row["error_class"],
            NanoUSD(row["suspense_nano"]),
            row["ended_at"],
        )
        for row in await database.fetch(_SQL["suspense"], limit)
    ]
