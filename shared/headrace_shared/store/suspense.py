"""Calls of which nobody knows whether they were billed, and decisions about them, as the store has them."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from headrace_shared.ids import CallNumber, JobId, Run, Tenant
from headrace_shared.money import NanoUSD
from headrace_shared.store.pool import Database
from headrace_shared.store.sql import Statements

PAGE = 500
"""Calls that are settled in one statement."""

BY_RULE = "rule"

_SQL = Statements("suspense.sql")


@dataclass(frozen=True, slots=True)
class SuspenseRow:
    """A call that may have been billed."""

    job_id: JobId
    run: int
    call: int
    tenant: str
    provider: str
    model: str
    reason: str | None
    amount: NanoUSD
    """The most that it can have cost."""
    since: datetime


@dataclass(frozen=True, slots=True)
class CallName:
    """A call, or all calls of a job."""

    job_id: JobId
    call: tuple[Run, CallNumber] | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """What calls in suspense came to, and who says so."""

    cost: NanoUSD | None
    """Of each; None: as much as it can have cost."""
    by: str
    """`rule`, or `operator` and what he said about it."""


@dataclass(frozen=True, slots=True)
class Meant:
    """Which calls in suspense are meant: those that meet all that is given."""

    named: tuple[CallName, ...] | None = None
    older_than: timedelta = timedelta(0)
    tenant: Tenant | None = None


@dataclass(frozen=True, slots=True)
class Settled:
    """A call that was in suspense."""

    job_id: JobId
    run: Run
    call: CallNumber
    tenant: Tenant
    suspense: NanoUSD
    """What it was in suspense with."""
    cost: NanoUSD


async def list_suspense(
    database: Database, *, tenant: Tenant | None = None, limit: int = 1000
) -> list[SuspenseRow]:
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
        for row in await database.fetch(_SQL["list_suspense"], limit, tenant)
    ]


async def settle_suspense(
    database: Database, meant: Meant, decision: Decision, *, limit: int = PAGE
) -> list[Settled]:
    """Decide what calls came to, the oldest first and so many at most; the counters are to follow."""
    rows = await database.fetch(
        _SQL["settle_suspense"],
        meant.older_than.total_seconds(),
        meant.tenant,
        *_named_columns(meant.named),
        decision.cost,
        decision.by,
        limit,
    )
    return [
        Settled(
            JobId(row["job_id"]),
            Run(row["run"]),
            CallNumber(row["call"]),
            Tenant(row["tenant"]),
            NanoUSD(row["suspense"]),
            NanoUSD(row["cost"]),
        )
        for row in rows
    ]


def _named_columns(named: Sequence[CallName] | None) -> tuple[list[object] | None, ...]:
    if named is None:
        return None, None, None
    return (
        [one.job_id for one in named],
        [one.call[0] if one.call else None for one in named],
        [one.call[1] if one.call else None for one in named],
    )
