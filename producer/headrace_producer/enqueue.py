"""Jobs are saved here: checked, inserted all or none, and announced."""

import asyncio
import contextlib
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import replace
from datetime import timedelta

import asyncpg

from headrace_producer.announcing import Announcer
from headrace_producer.checking import Checker, JobRequest
from headrace_producer.in_force import InForce, Snapshot, read_snapshot
from headrace_producer.reaching import reaching
from headrace_shared.batching import Batcher
from headrace_shared.dispatch.dispatch import Entry
from headrace_shared.errors import InvalidInput, StoreError
from headrace_shared.ids import JobId, Lane
from headrace_shared.job import NewJob
from headrace_shared.store.jobs import Inserted, insert_jobs
from headrace_shared.store.pool import Connection, Pool
from headrace_shared.telemetry import producer_span

CHUNK = 1000
"""Jobs in one statement; the next ones are checked while the server works on it."""

_TURN = 100
"""Jobs that are checked before other tasks have their turn (about 2 ms)."""

_TRIES = 5

Saved = tuple[NewJob, Inserted]


class _Outdated(Exception):
    """Another configuration is in force than the one that jobs were checked against."""


class Enqueuer:
    """Saves jobs for one client."""

    def __init__(
        self, pool: Pool, address: str, in_force: InForce, checker: Checker, announcer: Announcer
    ) -> None:
        self._pool = pool
        self._address = address
        self._in_force = in_force
        self._checker = checker
        self._announcer = announcer
        self._singles = Batcher(self._insert_singles, max_size=CHUNK)

    async def enqueue(
        self, requests: Sequence[JobRequest], connection: Connection | None = None
    ) -> list[Inserted]:
        """Save jobs, all or none, and return when they are committed.

        Args:
            requests: what to do.
            connection: the caller's own; then the jobs are saved when its transaction commits,
                which wakes the feeder.

        Raises:
            InvalidInput: one of them is wrong, and none was saved.
            IdempotencyConflict: likewise, one's key belongs to a job with another body.
            StoreUnavailable: it is not known whether they were saved; keys make it safe to try again.

        """
        if not requests:
            return []
        if connection is not None:
            return [inserted for _, inserted in await self._save(requests, connection)]
        with reaching(self._address):
            saved = await self._save(requests, None)
        await self._announcer.enqueued(_new_entries(saved))
        return [inserted for _, inserted in saved]

    async def _save(self, requests: Sequence[JobRequest], connection: Connection | None) -> list[Saved]:
        snapshot = await self._in_force.now()
        for _ in range(_TRIES):
            try:
                return await self._save_under(snapshot, requests, connection)
            except InvalidInput:
                # What is refused here may be fine by now: only the newest configuration refuses.
                newest = await self._renewed(snapshot, connection)
                if newest.version == snapshot.version:
                    raise
            except _Outdated:
                newest = await self._renewed(snapshot, connection)
            except asyncpg.DeadlockDetectedError:
                # Somebody saves many with the same keys in another order; nothing was saved here.
                if connection is not None:
                    raise
                newest = snapshot
            snapshot = newest
        raise StoreError(reason="others change the configuration, or the same keys, all the time; try again")

    async def _renewed(self, old: Snapshot, connection: Connection | None) -> Snapshot:
        # A transaction of the caller's may go on seeing an older one: what it sees counts there.
        return await (self._in_force.after(old) if connection is None else read_snapshot(connection))

    async def _save_under(
        self, snapshot: Snapshot, requests: Sequence[JobRequest], connection: Connection | None
    ) -> list[Saved]:
        if len(requests) == 1:
            return await self._save_one(snapshot, requests[0], connection)
        lane = Lane(snapshot.configuration.defaults.lane)
        borrowed: AbstractAsyncContextManager[Connection] = (
            self._pool.acquire() if connection is None else nullcontext(connection)
        )
        with producer_span(lane, count=len(requests)) as traceparent:
            async with borrowed as own, own.transaction():
                notify = connection is not None
                return await self._save_many(snapshot, requests, own, traceparent, notify=notify)

    async def _save_one(
        self, snapshot: Snapshot, request: JobRequest, connection: Connection | None
    ) -> list[Saved]:
        job = self._checker.check(request, snapshot, None)
        with producer_span(job.lane, job_id=job.id) as traceparent:
            job = replace(job, traceparent=traceparent) if traceparent else job
            jobs = [job]
            if connection is None and job.idempotency_key is None:
                saved = await self._singles.submit((snapshot, job))
                if saved is None:
                    raise _Outdated
                return [saved]
            if connection is None:
                return await _insert(self._pool, snapshot, jobs, notify=False)
            async with connection.transaction():  # a refusal leaves the caller's usable
                return await _insert(connection, snapshot, jobs, notify=True)

    async def _insert_singles(self, batch: Sequence[tuple[Snapshot, NewJob]]) -> list[Saved | None]:
        """Save jobs of callers at the same time in one statement; None for what is outdated.

        Only jobs without a key: a key that belongs to another body would undo the others.
        """
        saved: dict[JobId, Saved] = {}
        for snapshot in {snapshot.version: snapshot for snapshot, _ in batch}.values():
            jobs = [job for its, job in batch if its.version == snapshot.version]
            # The others of the batch are saved by now, or will be: only these are checked again.
            with contextlib.suppress(_Outdated):
                saved |= {one[0].id: one for one in await _insert(self._pool, snapshot, jobs, notify=False)}
        return [saved.get(job.id) for _, job in batch]

    async def _save_many(
        self,
        snapshot: Snapshot,
        requests: Sequence[JobRequest],
        connection: Connection,
        traceparent: str | None,
        *,
        notify: bool,
    ) -> list[Saved]:
        saved: list[Saved] = []
        inserting: asyncio.Task[list[Saved]] | None = None
        try:
            for start in range(0, len(requests), CHUNK):
                jobs = await self._check_all(snapshot, requests, range(start, start + CHUNK), traceparent)
                if inserting is not None:
                    saved += await inserting
                inserting = asyncio.create_task(_insert(connection, snapshot, jobs, notify=notify))
            return saved + await inserting if inserting else saved
        finally:
            if inserting is not None and not inserting.done():
                # The transaction can be rolled back only when nothing runs in it.
                inserting.cancel()
                await asyncio.gather(inserting, return_exceptions=True)

    async def _check_all(
        self, snapshot: Snapshot, requests: Sequence[JobRequest], indices: range, traceparent: str | None
    ) -> list[NewJob]:
        jobs: list[NewJob] = []
        for index in indices[: len(requests) - indices.start]:
            if index % _TURN == 0:
                await asyncio.sleep(0)
            try:
                jobs.append(self._checker.check(requests[index], snapshot, traceparent))
            except InvalidInput as error:
                error.add_note(f"This is about requests[{index}]; none of the {len(requests)} was enqueued.")
                raise
        return jobs


async def _insert(
    database: Pool | Connection, snapshot: Snapshot, jobs: Sequence[NewJob], *, notify: bool
) -> list[Saved]:
    keep_keys = snapshot.configuration.defaults.idempotency
    inserted = await insert_jobs(
        database, jobs, configuration=snapshot.version, keep_keys=keep_keys, notify=notify
    )
    if inserted is None:
        raise _Outdated
    return list(zip(jobs, inserted, strict=True))


def _new_entries(saved: Sequence[Saved]) -> list[tuple[Entry, timedelta]]:
    return [(Entry(job.queue, job.id), inserted.due_in) for job, inserted in saved if not inserted.existed]
