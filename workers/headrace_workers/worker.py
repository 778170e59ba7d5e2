"""The worker: arq's, with its claiming, keeping and ending of jobs replaced.

What stays arq's: the life of the process (`run`, signals, hooks, burst mode), the
bookkeeping of tasks and slots, the health record. What is replaced, and why, is in
docs/adr/0002-arq-subclassed.md. The version of arq is pinned, and a test compares what is
overridden here with what arq has.
"""

# pyright: reportUnknownMemberType=false
import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from signal import Signals

from arq.connections import ArqRedis
from arq.worker import Worker as ArqWorker
from arq.worker import func

from headrace_shared.dispatch.dispatch import Claim, Dispatch, Entry
from headrace_shared.errors import DispatchUnavailable, InvalidConfiguration
from headrace_shared.ids import JobId, Lane, WorkerId
from headrace_shared.job import ClaimedJob
from headrace_shared.logs import Occasional, bind_job
from headrace_shared.outcome import ErrorClass, Failed, Outcome, Retry, Snoozed, Succeeded, WaitReason
from headrace_shared.store import runs
from headrace_shared.store.pool import UNREACHABLE, Pool
from headrace_shared.store.runs import Standing, Unclaimed
from headrace_shared.telemetry import consumer_span
from headrace_workers.configured import Configured
from headrace_workers.execution import Execution
from headrace_workers.handlers.loading import NO_HANDLERS, Handlers
from headrace_workers.reach import Reach
from headrace_workers.store_claims import StoreClaims
from headrace_workers.suspects import Suspects
from headrace_workers.telemetry import Metrics

_logger = logging.getLogger(__name__)
_occasionally = Occasional(_logger)

POLL = timedelta(seconds=1)
"""How long a worker listens for the bell before it looks by itself."""

_MAX_PAUSE = 2.0
_MOMENT = timedelta(milliseconds=100)
_UNKNOWN_PAUSE = timedelta(seconds=5)
"""How long a job waits that this worker does not know how to run; others may."""
_SUSPECT_PAUSE = timedelta(seconds=1)
"""How long a job waits that is to run alone while this worker has enough of those; others may not."""


async def run_job(ctx: dict[object, object], *args: object, **kwargs: object) -> None:
    """Stand for a job's work where arq asks for a function; the row says what the work is."""
    del ctx, args, kwargs


class Worker(ArqWorker):
    """Claims jobs in bulk, runs them through the execution, and never ends for an outage.

    Args:
        redis_url: for arq's own connections, which carry its health record.
        worker_id: under which rows are claimed.
        slots: jobs that run at a time.
        lanes: the lanes served; None for all that are configured.
        handlers: of the application's own, whose jobs are served in the same lanes.
        running: filled with the jobs that are claimed, emptied as they end.

    """

    def __init__(
        self,
        *,
        redis_url: str,
        worker_id: WorkerId,
        slots: int,
        lanes: tuple[Lane, ...] | None,
        lease: timedelta,
        drain: timedelta,
        pool: Pool,
        dispatch: Dispatch,
        reach: Reach,
        configured: Configured,
        running: dict[JobId, ClaimedJob],
        execution: Execution,
        suspects: Suspects,
        metrics: Metrics,
        handlers: Handlers = NO_HANDLERS,
        burst: bool = False,
        handle_signals: bool = True,
    ) -> None:
        super().__init__(
            functions=[func(run_job, name="headrace", keep_result=0, timeout=lease)],
            redis_pool=ArqRedis.from_url(redis_url),
            queue_name="headrace",
            max_jobs=slots,
            max_tries=1,
            keep_result=0,
            burst=burst,
            handle_signals=handle_signals,
            job_completion_wait=max(1, round(drain.total_seconds())),
            health_check_key=f"headrace:health:{worker_id}",
            health_check_interval=10,
        )
        self.worker_id = worker_id
        self.running = running
        self._lanes = lanes
        self._lease = lease
        self._drain = drain
        self._store = pool
        self._dispatch = dispatch
        self._reach = reach
        self._store_claims = StoreClaims(pool, worker_id, handlers.abilities)
        self._configured = configured
        self._execution = execution
        self._suspects = suspects
        self._metrics = metrics
        self._handlers = handlers
        self._job_tasks: dict[JobId, asyncio.Task[None]] = {}
        self._slot_freed = asyncio.Event()
        self._draining = asyncio.Event()
        self._pause = 0.05
        self.callback_bell = asyncio.Event()
        """Set when a job ended that has a callback."""

    @property
    def draining(self) -> bool:
        return self._draining.is_set()

    def lanes(self) -> Mapping[Lane, int]:
        """Return the lanes this worker serves, with their weights in the present configuration."""
        weights = self._configured.now.configuration.lane_weights()
        served = weights if self._lanes is None else {lane: weights.get(lane, 1) for lane in self._lanes}
        return {**served, **{own: served[lane] for own, lane in self._handlers.lanes(served)}}

    def _leases(self) -> Mapping[Lane, timedelta]:
        leases = self._configured.now.configuration.lane_leases()
        return {**leases, **{own: leases[lane] for own, lane in self._handlers.lanes(leases)}}

    def shortest_lease(self) -> timedelta:
        """Return the shortest lease of a lane: heartbeats go by it."""
        return min([self._lease, *self._leases().values()])

    def interrupt(self, job_id: JobId, reason: WaitReason | ErrorClass) -> None:
        """Cancel a running job; its run ends for this reason."""
        job, task = self.running.get(job_id), self._job_tasks.get(job_id)
        if reason is WaitReason.LOST_LEASE:
            self._metrics.leases_lost()
        if job is not None and task is not None:
            self._execution.interrupt(job, reason, task)

    async def main(self) -> None:
        """Claim and run jobs until the process is told to stop; outages are waited out."""
        health = asyncio.create_task(self._record_health(), name="health")
        try:
            while not self.draining:
                try:
                    idle = not await self._fill_slots()
                    self._pause = 0.05
                except (DispatchUnavailable, *UNREACHABLE) as error:
                    await self._wait_out(error)
                    continue
                except Exception as error:
                    _logger.exception("claiming failed")
                    await self._wait_out(error)
                    continue
                if self.burst and idle and not self._busy():
                    return
            await self._until_drained()
        finally:
            health.cancel()

    async def _fill_slots(self) -> bool:
        """Claim as many jobs as there are free slots; false, after a wait, when there were none."""
        free = self.max_jobs - self._busy()
        if free <= 0:
            self._slot_freed.clear()
            await self._first_of(self._slot_freed.wait())
            return True
        if self._reach.without_redis:
            return await self._fill_from_store(free)
        claim = await self._dispatch.claim(
            free,
            self.lanes(),
            self._lease,
            self._configured.now.breaker.probe_lease,
            leases=self._leases(),
        )
        if claim.foreign:
            self._metrics.foreign_dropped(claim.foreign)
            _logger.warning("%d members of queues were no job ids and were taken out", claim.foreign)
        if claim.entries:
            await self._start(claim)
            return True
        if not self.burst or self._busy():
            await self._wait_for_work(claim)
        return False

    async def _fill_from_store(self, free: int) -> bool:
        claims = await self._store_claims.claim(
            free,
            self.lanes(),
            self._lease_of,
            take_suspect=lambda job_id: self._suspects.take(job_id, self._suspect_ended),
        )
        if claims.configuration is not None:
            await self.follow(claims.configuration)
        for job in claims.jobs:
            self._start_one(job)
        if claims.jobs or not self.burst:
            await self._first_of(self._store_claims.rest())
        return bool(claims.jobs)

    def _lease_of(self, lane: Lane) -> timedelta:
        return self._leases().get(lane, self._lease)

    def _busy(self) -> int:
        return len(self.running) + len(self._suspects)

    async def _start(self, claim: Claim) -> None:
        by_lease: dict[timedelta, list[Entry]] = {}
        for entry in claim.entries:
            by_lease.setdefault(self._lease_of(entry.queue.lane), []).append(entry)
        for lease, entries in by_lease.items():
            await self._start_some(entries, lease)

    async def _start_some(self, entries: Sequence[Entry], lease: timedelta) -> None:
        try:
            claims = await runs.claim_jobs(
                self._store,
                [entry.id for entry in entries],
                self.worker_id,
                lease,
                abilities=self._handlers.abilities,
            )
        except UNREACHABLE:
            with contextlib.suppress(DispatchUnavailable):
                await self._dispatch.finish([(entry, _MOMENT) for entry in entries])
            raise
        if claims.configuration is not None:
            await self.follow(claims.configuration)
        for job in claims.jobs:
            self._start_one(job)
        claimed = {job.id for job in claims.jobs}
        await self._put_right([entry for entry in entries if entry.id not in claimed])

    def _start_one(self, job: ClaimedJob) -> None:
        self.running[job.id] = job
        task = self.loop.create_task(self._run(job), name=f"job-{job.id}")
        self._job_tasks[job.id] = task
        task.add_done_callback(self._report)
        if job.time_left is not None:
            timer = self.loop.call_later(job.time_left.total_seconds(), self._run_out, job)
            task.add_done_callback(lambda _: timer.cancel())

    def _run_out(self, job: ClaimedJob) -> None:
        if self.running.get(job.id) is job:
            self.interrupt(job.id, ErrorClass.EXPIRED)

    async def follow(self, version: int) -> None:
        """Work under this version of the configuration, or a newer one, from now on."""
        try:
            await self._configured.follow(version)
        except (InvalidConfiguration, *UNREACHABLE) as error:
            # The jobs are claimed: they run under the version that is here; the next claim asks again.
            _logger.warning("configuration %d cannot be followed: %s", version, error)

    async def _run(self, job: ClaimedJob) -> None:
        began = self.loop.time()
        bind_job(job.id, job.run, job.traceparent)
        try:
            with consumer_span(job) as span:
                outcome = await self._execution.run(job)
                span.ended(outcome)
            self._count(job, outcome, timedelta(seconds=self.loop.time() - began))
        finally:
            # A row can be claimed again by this very worker before its first run has ended.
            if self.running.get(job.id) is job:
                del self.running[job.id]
                del self._job_tasks[job.id]
            self._slot_freed.set()
            if job.has_webhook:
                self.callback_bell.set()

    def _count(self, job: ClaimedJob, outcome: Outcome, ran: timedelta) -> None:
        ended = not isinstance(outcome, Retry | Snoozed)
        age = datetime.now(UTC) - job.created_at if ended else None
        self._metrics.run_ended(job, outcome, ran=ran, age=age)
        self.jobs_retried += not ended
        self.jobs_failed += isinstance(outcome, Failed)
        self.jobs_complete += isinstance(outcome, Succeeded)

    @staticmethod
    def _report(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _logger.error("%s could not be written down", task.get_name(), exc_info=error)

    async def _put_right(self, entries: list[Entry]) -> None:
        """Correct the queue where it says something else than the rows."""
        if not entries:
            return
        self._metrics.duplicates_dropped(len(entries))
        ids = [entry.id for entry in entries]
        found = {one.id: one for one in await runs.look_up(self._store, ids, self._handlers.abilities)}
        unknown = [one.id for one in found.values() if one.standing is Standing.UNKNOWN]
        if unknown:
            _logger.warning("%d jobs need a worker that knows more than this one", len(unknown))
            await runs.put_off(self._store, unknown, _UNKNOWN_PAUSE)
        suspects = [one.id for one in found.values() if one.standing is Standing.SUSPECT]
        # Those keep the lease of their claim, until their own process renews it.
        taken = {job_id for job_id in suspects if self._suspects.take(job_id, self._suspect_ended)}
        await self._dispatch.finish(
            [(entry, self._due_in(found.get(entry.id))) for entry in entries if entry.id not in taken]
        )

    def _suspect_ended(self) -> None:
        self._slot_freed.set()
        self.callback_bell.set()

    @staticmethod
    def _due_in(found: Unclaimed | None) -> timedelta | None:
        """Until an id that was not claimed is due again; None for one whose job has ended."""
        if found is None:
            return None
        match found.standing:
            case Standing.ENDED:
                return None
            case Standing.RUNNING | Standing.EARLY | Standing.DUE:
                return found.due_in
            case Standing.UNKNOWN:
                return _UNKNOWN_PAUSE
            case Standing.OVERDUE:
                return _MOMENT
            case Standing.SUSPECT:
                return _SUSPECT_PAUSE

    async def _wait_for_work(self, claim: Claim) -> None:
        wait = min(POLL, claim.next_due) if claim.next_due is not None else POLL
        lanes = tuple(self.lanes())
        await self._first_of(self._dispatch.wait_for_jobs(lanes, max(wait, timedelta(milliseconds=5))))

    async def _first_of(self, waiting: Coroutine[object, object, bool]) -> None:
        """Wait for something, but not once the worker is told to stop."""
        task = self.loop.create_task(waiting)
        stop = self.loop.create_task(self._draining.wait())
        try:
            await asyncio.wait((task, stop), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
        finally:
            task.cancel()
            stop.cancel()
            await asyncio.gather(task, stop, return_exceptions=True)

    async def _wait_out(self, error: Exception) -> None:
        _occasionally.warning("claiming waits: %s", error)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._draining.wait(), self._pause)
        self._pause = min(2 * self._pause, _MAX_PAUSE)

    async def _until_drained(self) -> None:
        """Let running jobs end within the grace time; give back the others at once."""
        deadline = time.monotonic() + self._drain.total_seconds()
        while self._job_tasks and time.monotonic() < deadline:
            await asyncio.wait(list(self._job_tasks.values()), timeout=deadline - time.monotonic())
        await self._suspects.until_ended(timedelta(seconds=deadline - time.monotonic()))
        self.give_back()
        if self._job_tasks:
            await asyncio.wait(list(self._job_tasks.values()))
        await self._suspects.leave()

    def stop(self) -> None:
        """Claim nothing more; `main` returns when the running jobs have ended or were given back."""
        self._draining.set()
        self._suspects.stop()
        self.allow_pick_jobs = False

    def handle_sig(self, signum: Signals) -> None:
        """Drain at the first signal, give everything back at the second."""
        self.handle_sig_wait_for_completion(signum)

    def handle_sig_wait_for_completion(self, signum: Signals) -> None:
        _logger.info("%s: draining %d jobs", Signals(signum).name, len(self.running))
        if self.draining:
            self.give_back()
        self.stop()

    def give_back(self) -> None:
        """Put all running jobs back at once; it costs them no attempt."""
        for job_id in list(self._job_tasks):
            self.interrupt(job_id, WaitReason.SHUTDOWN)
        self._suspects.give_back()

    async def _record_health(self) -> None:
        while True:
            with contextlib.suppress(Exception):  # arq's record is for its own tools; nothing depends on it
                await self.record_health()
            await asyncio.sleep(self.health_check_interval)

    async def close(self) -> None:
        """Close arq's connections."""
        # A server that hangs must not keep the process.
        with contextlib.suppress(Exception):
            async with asyncio.timeout(_MAX_PAUSE):
                await self.pool.delete(self.health_check_key)
        with contextlib.suppress(Exception):
            async with asyncio.timeout(_MAX_PAUSE):
                await self.pool.aclose(close_connection_pool=True)
