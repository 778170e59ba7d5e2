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
from collections.abc import Coroutine, Mapping
from datetime import UTC, datetime, timedelta
from signal import Signals

from arq.connections import ArqRedis
from arq.worker import Worker as ArqWorker
from arq.worker import func

from headrace_shared.dispatch.dispatch import Claim, Dispatch, Entry
from headrace_shared.errors import DispatchUnavailable, InvalidConfiguration
from headrace_shared.ids import JobId, Lane, WorkerId
from headrace_shared.job import ClaimedJob
from headrace_shared.logs import bind_job
from headrace_shared.outcome import ErrorClass, Failed, Outcome, Retry, Snoozed, Succeeded, WaitReason
from headrace_shared.store import runs
from headrace_shared.store.pool import UNREACHABLE, Pool
from headrace_shared.telemetry import consumer_span
from headrace_workers.configured import Configured
from headrace_workers.execution import Execution
from headrace_workers.telemetry import Metrics

_logger = logging.getLogger(__name__)

POLL = timedelta(seconds=1)
"""How long a worker listens for the bell before it looks by itself."""

_MAX_PAUSE = 2.0
_MOMENT = timedelta(milliseconds=100)


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
        configured: Configured,
        running: dict[JobId, ClaimedJob],
        execution: Execution,
        metrics: Metrics,
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
        self._configured = configured
        self._execution = execution
        self._metrics = metrics
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
        if self._lanes is None:
            return weights
        return {lane: weights.get(lane, 1) for lane in self._lanes}

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
                if self.burst and idle and not self.running:
                    return
            await self._until_drained()
        finally:
            health.cancel()

    async def _fill_slots(self) -> bool:
        """Claim as many jobs as there are free slots; false, after a wait, when there were none."""
        free = self.max_jobs - len(self.running)
        if free <= 0:
            self._slot_freed.clear()
            await self._first_of(self._slot_freed.wait())
            return True
        claim = await self._dispatch.claim(
            free, self.lanes(), self._lease, self._configured.now.breaker.probe_lease
        )
        if claim.foreign:
            self._metrics.foreign_dropped(claim.foreign)
            _logger.warning("%d members of queues were no job ids and were taken out", claim.foreign)
        if claim.entries:
            await self._start(claim)
            return True
        if not self.burst or self.running:
            await self._wait_for_work(claim)
        return False

    async def _start(self, claim: Claim) -> None:
        try:
            claims = await runs.claim_jobs(
                self._store, [entry.id for entry in claim.entries], self.worker_id, self._lease
            )
        except UNREACHABLE:
            with contextlib.suppress(DispatchUnavailable):
                await self._dispatch.finish([(entry, _MOMENT) for entry in claim.entries])
            raise
        if claims.configuration is not None:
            await self.follow(claims.configuration)
        for job in claims.jobs:
            self.running[job.id] = job
            task = self.loop.create_task(self._run(job), name=f"job-{job.id}")
            self._job_tasks[job.id] = task
            task.add_done_callback(self._report)
        claimed = {job.id for job in claims.jobs}
        await self._put_right([entry for entry in claim.entries if entry.id not in claimed])

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
        standings = {one.id: one for one in await runs.look_up(self._store, [entry.id for entry in entries])}
        corrections: list[tuple[Entry, timedelta | None]] = []
        for entry in entries:
            standing = standings.get(entry.id)
            over = standing is None or standing.state.ended
            corrections.append((entry, None if over or standing is None else standing.due_in))
        await self._dispatch.finish(corrections)

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
        _logger.warning("claiming waits: %s", error)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._draining.wait(), self._pause)
        self._pause = min(2 * self._pause, _MAX_PAUSE)

    async def _until_drained(self) -> None:
        """Let running jobs end within the grace time; give back the others at once."""
        deadline = time.monotonic() + self._drain.total_seconds()
        while self._job_tasks and time.monotonic() < deadline:
            await asyncio.wait(list(self._job_tasks.values()), timeout=deadline - time.monotonic())
        self.give_back()
        if self._job_tasks:
            await asyncio.wait(list(self._job_tasks.values()))

    def stop(self) -> None:
        """Claim nothing more; `main` returns when the running jobs have ended or were given back."""
        self._draining.set()
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

    async def _record_health(self) -> None:
        while True:
            with contextlib.suppress(Exception):  # arq's record is for its own tools; nothing depends on it
                await self.record_health()
            await asyncio.sleep(self.health_check_interval)

    async def close(self) -> None:
        """Close arq's connections."""
        with contextlib.suppress(Exception):
            await self.pool.delete(self.health_check_key)
        with contextlib.suppress(Exception):
            await self.pool.aclose(close_connection_pool=True)
