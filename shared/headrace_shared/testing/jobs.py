"""Jobs for tests of what runs them: put in at the store, looked at in the store."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TypeVar

import asyncpg

from headrace_shared.configuration import Configuration
from headrace_shared.dispatch.dispatch import Dispatch, Entry
from headrace_shared.ids import JobId, Lane, RouteName, Run, Tenant, new_job_id
from headrace_shared.job import ClaimedJob, Ending, NewJob, Queue
from headrace_shared.request import Endpoint
from headrace_shared.store import configurations, jobs
from headrace_shared.store.pool import UNREACHABLE, Database, Pool

T = TypeVar("T")

MODEL = "gpt-4o-mini"
TENANT = Tenant("acme")
LANE = Lane("default")
PATIENCE = timedelta(seconds=30)
_LOOK = 0.02


async def eventually(
    read: Callable[[], Awaitable[T]], holds: Callable[[T], bool], *, within: timedelta = PATIENCE
) -> T:
    """Read until what was read holds, and return it; servers that are away are waited for.

    Raises:
        TimeoutError: it says what was read last.

    """
    last: object = None
    try:
        async with asyncio.timeout(within.total_seconds()):
            while True:
                try:
                    last = found = await read()
                except UNREACHABLE as error:
                    last = error
                else:
                    if holds(found):
                        return found
                await asyncio.sleep(_LOOK)
    except TimeoutError:
        raise TimeoutError(f"after {within}: {last!r}") from None


def claimed_job(body: bytes = b"{}", *, model: str = MODEL, lane: Lane = LANE) -> ClaimedJob:
    """Return a job as a worker holds it that has just claimed it for the first time; no row is like it."""
    return ClaimedJob(
        id=new_job_id(),
        run=Run(1),
        queue=Queue(lane, RouteName(model), TENANT),
        endpoint=Endpoint.CHAT_COMPLETIONS,
        body=body,
        attempts=0,
        max_attempts=6,
        created_at=datetime.now(UTC),
        waited=timedelta(0),
        lease=timedelta(seconds=30),
    )


@dataclass(frozen=True, slots=True)
class Jobs:
    """What a test does with jobs, where a client would do more."""

    pool: Pool
    dispatch: Dispatch

    async def add(
        self,
        count: int = 1,
        *,
        model: str = MODEL,
        tenant: Tenant = TENANT,
        api_key: str | None = None,
        lane: Lane = LANE,
        endpoint: Endpoint = Endpoint.CHAT_COMPLETIONS,
        body: Mapping[str, object] | None = None,
        max_attempts: int = 6,
        delay: timedelta = timedelta(0),
        webhook: str | None = None,
        push: bool = True,
        database: Database | None = None,
        notify: bool = False,
    ) -> list[JobId]:
        """Insert jobs and, with `push`, put their ids into the dispatch."""
        present = await configurations.current(self.pool)
        queue = Queue(lane, RouteName(model), tenant, api_key)
        new = [
            NewJob(
                id=new_job_id(),
                tenant=tenant,
                lane=lane,
                route=queue.route,
                endpoint=endpoint,
                body=json.dumps({"model": model, **(body or _question(number))}).encode(),
                max_attempts=max_attempts,
                delay=delay,
                webhook=webhook,
                metadata={"number": str(number)},
                api_key=api_key,
            )
            for number in range(count)
        ]
        await jobs.insert_jobs(
            database or self.pool,
            new,
            configuration=present.version,
            keep_keys=timedelta(days=1),
            notify=notify,
        )
        if push:
            await self.dispatch.push([(Entry(queue, job.id), delay) for job in new])
        return [job.id for job in new]

    async def ended(self, ids: Sequence[JobId], *, within: timedelta = PATIENCE) -> list[Ending]:
        """Wait until jobs have ended and return their endings in the same order."""
        await eventually(lambda: self._open(ids), lambda left: left == 0, within=within)
        return [await self.ending(job_id) for job_id in ids]

    async def ending(self, job_id: JobId) -> Ending:
        """Return how a job stands.

        Raises:
            LookupError: there is none.

        """
        ending = await jobs.get_ending(self.pool, job_id)
        if ending is None:
            raise LookupError(job_id)
        return ending

    async def row(self, job_id: JobId) -> asyncpg.Record:
        """Return the whole row of a job.

        Raises:
            LookupError: there is none.

        """
        row = await self.pool.fetchrow("SELECT * FROM headrace.jobs WHERE id = $1", job_id)
        if row is None:
            raise LookupError(job_id)
        return row

    async def until(self, job_id: JobId, holds: Callable[[asyncpg.Record], bool]) -> asyncpg.Record:
        """Wait until something holds of a job's row."""
        return await eventually(lambda: self.row(job_id), holds)

    async def calls(self, job_id: JobId) -> list[asyncpg.Record]:
        return await self.pool.fetch(
            "SELECT * FROM headrace.calls WHERE job_id = $1 ORDER BY run, call", job_id
        )

    async def attempts(self, job_id: JobId) -> list[asyncpg.Record]:
        return await self.pool.fetch(
            "SELECT * FROM headrace.attempts WHERE job_id = $1 ORDER BY run, number", job_id
        )

    async def deliveries(self, job_id: JobId) -> list[asyncpg.Record]:
        return await self.pool.fetch("SELECT * FROM headrace.deliveries WHERE job_id = $1", job_id)

    async def configure(self, document: Mapping[str, object]) -> int:
        """Put a configuration in force and return its version."""
        applied = await configurations.apply(self.pool, Configuration.from_document(document), "test")
        return applied.version

    async def ledger(self) -> dict[tuple[str, str], tuple[int, int]]:
        """Sum the ledger as `spend` should have it: (scope, window) -> (settled, suspense)."""
        return _sums(
            await self.pool.fetch(
                "SELECT scope, name, sum(cost_nano)::bigint AS settled,"
                " sum(suspense_nano)::bigint AS suspense"
                " FROM headrace.calls, unnest(scopes) AS scope, unnest(headrace.windows(held_at)) AS name"
                " GROUP BY scope, name HAVING sum(cost_nano) + sum(suspense_nano) > 0"
            )
        )

    async def spend(self) -> dict[tuple[str, str], tuple[int, int]]:
        """Return what was booked: (scope, window) -> (settled, suspense)."""
        return _sums(
            await self.pool.fetch(
                "SELECT scope, window_name AS name, sum(settled_nano)::bigint AS settled,"
                " sum(suspense_nano)::bigint AS suspense FROM headrace.spend GROUP BY scope, window_name"
                " HAVING sum(settled_nano) <> 0 OR sum(suspense_nano) <> 0"
            )
        )

    async def _open(self, ids: Sequence[JobId]) -> int:
        return int(
            await self.pool.fetchval(
                "SELECT count(*) FROM unnest($1::uuid[]) AS wanted(id)"
                " LEFT JOIN headrace.jobs j USING (id) WHERE j.ended_at IS NULL",
                ids,
            )
        )


def _question(number: int) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": f"What is {number}?"}]}


def _sums(rows: Sequence[asyncpg.Record]) -> dict[tuple[str, str], tuple[int, int]]:
    return {(row["scope"], row["name"]): (int(row["settled"]), int(row["suspense"])) for row in rows}
