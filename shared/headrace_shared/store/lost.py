"""What becomes of jobs, calls and holds that nobody looks after any more."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import asyncpg

from headrace_shared.ids import HoldId, JobId, WorkerId
from headrace_shared.job import JobState, Queue
from headrace_shared.money import NanoUSD
from headrace_shared.store.jobs import queue_of
from headrace_shared.store.pool import Connection, Database, Pool, in_transaction
from headrace_shared.store.sql import Statements

_SQL = Statements("lost.sql")


@dataclass(frozen=True, slots=True)
class Reaped:
    """A job that was taken back or ended by somebody else than its run."""

    id: JobId
    queue: Queue
    state: JobState


@dataclass(frozen=True, slots=True)
class LedgerHold:
    """A hold as its call's row has it."""

    open: bool
    cost: NanoUSD
    suspense: NanoUSD


async def expire(database: Database, *, limit: int = 500) -> list[Reaped]:
    """End queued jobs whose time ran out."""
    return [_reaped(row) for row in await database.fetch(_SQL["expire"], limit)]


async def reap(
    database: Pool | Connection, *, spare: timedelta = timedelta(0), limit: int = 500
) -> list[Reaped]:
    """Take back jobs whose lease ended; their open calls stand in suspense from now on.

    Args:
        database: where.
        spare: for so long after the start of PostgreSQL nothing is taken back: nobody could renew.
        limit: jobs at most.

    """
    async with in_transaction(database) as connection:
        rows = await connection.fetch(_SQL["reap"], limit, spare.total_seconds())
        await _suspend(connection, rows)
    return [_reaped(row) for row in rows]


async def quarantine(database: Pool | Connection, job_id: JobId, worker: WorkerId, how: str) -> Reaped | None:
    """End a job whose own process died; None when it does not run there any more.

    Args:
        database: where.
        job_id: the job that was alone.
        worker: the process it was alone in.
        how: what was seen of the death, for the job's error.

    """
    async with in_transaction(database) as connection:
        rows = await connection.fetch(_SQL["quarantine"], job_id, worker, how)
        await _suspend(connection, rows)
    return _reaped(rows[0]) if rows else None


async def _suspend(connection: Database, lost: Sequence[asyncpg.Record]) -> None:
    if lost:
        await connection.execute(
            _SQL["suspend_lost"], [row["id"] for row in lost], [row["run"] for row in lost]
        )


def _reaped(row: asyncpg.Record) -> Reaped:
    return Reaped(JobId(row["id"]), queue_of(row), JobState(row["state"]))


async def suspend_orphans(database: Database) -> dict[HoldId, NanoUSD]:
    """Put open calls whose run has ended into suspense; return their holds with their amounts."""
    return {
        HoldId(row["hold_id"]): NanoUSD(row["amount_nano"])
        for row in await database.fetch(_SQL["suspend_orphans"])
    }


async def holds_in_ledger(database: Database, holds: Sequence[HoldId]) -> dict[HoldId, LedgerHold]:
    """Say what became of the calls that holds pay for; a hold without a call is not in it."""
    ids = [hold.split(":", 1)[0] for hold in holds]
    return {
        HoldId(row["hold_id"]): LedgerHold(
            row["state"] == "open", NanoUSD(row["cost_nano"]), NanoUSD(row["suspense_nano"])
        )
        for row in await database.fetch(_SQL["holds_in_ledger"], ids, holds)
    }
