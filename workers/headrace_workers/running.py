"""The jobs that a process has claimed and not yet ended, and the tasks that run them."""

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from headrace_shared.ids import JobId, Run
from headrace_shared.job import ClaimedJob
from headrace_shared.logs import bind_job
from headrace_shared.outcome import ErrorClass, Outcome, Retry, Snoozed, WaitReason
from headrace_shared.telemetry import consumer_span
from headrace_workers.execution import Execution
from headrace_workers.telemetry import Metrics

_logger = logging.getLogger(__name__)


class Running:
    """Runs claimed jobs through the execution, each in a task, until they end or are interrupted.

    Args:
        jobs: filled with the jobs that are started; each goes when its end is committed (`Finisher`), or with
            its task at the latest.
        execution: takes each of them through its steps.
        metrics: told of each run that ended.

    """

    def __init__(self, jobs: dict[JobId, ClaimedJob], execution: Execution, metrics: Metrics) -> None:
        self._jobs = jobs
        self._execution = execution
        self._metrics = metrics
        self._tasks: dict[tuple[JobId, Run], asyncio.Task[None]] = {}
        self._tell: Callable[[Outcome], None] | None = None
        self.slot_freed = asyncio.Event()
        """Set when a run ended; who waits for it clears it before."""
        self.callback_bell = asyncio.Event()
        """Set when a job ended that has a callback."""

    def __len__(self) -> int:
        return len(self._tasks)

    def tell(self, ended: Callable[[Outcome], None]) -> None:
        """Call this with the outcome of each run that ends from now on."""
        self._tell = ended

    def start(self, job: ClaimedJob) -> asyncio.Task[None]:
        """Run a job that was claimed; at the end of its time, if it has one, it is interrupted.

        The task ends with the run, and fails when what came of it could not be written down.
        """
        loop = asyncio.get_running_loop()
        # A process that stood still can claim its own job again before a heartbeat tells it of the loss.
        if (lost := self._jobs.get(job.id)) is not None:
            self._stop(lost, WaitReason.LOST_LEASE)
        self._jobs[job.id] = job
        task = loop.create_task(self._run(job), name=f"job-{job.id}")
        self._tasks[job.id, job.run] = task
        task.add_done_callback(_report)
        if job.time_left is not None:
            timer = loop.call_later(job.time_left.total_seconds(), self._run_out, job)
            task.add_done_callback(lambda _: timer.cancel())
        return task

    def interrupt(self, job_id: JobId, reason: WaitReason | ErrorClass) -> None:
        """Cancel a running job; its run ends for this reason."""
        if (job := self._jobs.get(job_id)) is not None:
            self._stop(job, reason)

    def give_back(self) -> None:
        """Put all running jobs back at once; it costs them no attempt."""
        for job in list(self._jobs.values()):
            self._stop(job, WaitReason.SHUTDOWN)

    async def until_ended(self, timeout: timedelta | None = None) -> None:
        """Wait for the runs that are there, for some time at most where one is given."""
        if self._tasks:
            seconds = None if timeout is None else max(0.0, timeout.total_seconds())
            await asyncio.wait(list(self._tasks.values()), timeout=seconds)

    def _stop(self, job: ClaimedJob, reason: WaitReason | ErrorClass) -> None:
        if reason is WaitReason.LOST_LEASE:
            self._metrics.leases_lost()
        self._execution.interrupt(job, reason, self._tasks[job.id, job.run])

    def _run_out(self, job: ClaimedJob) -> None:
        if self._jobs.get(job.id) is job:
            self.interrupt(job.id, ErrorClass.EXPIRED)

    async def _run(self, job: ClaimedJob) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        bind_job(job.id, job.run, job.traceparent)
        try:
            with consumer_span(job) as span:
                outcome = await self._execution.run(job)
                span.ended(outcome)
            self._count(job, outcome, timedelta(seconds=loop.time() - began))
        finally:
            del self._tasks[job.id, job.run]
            if self._jobs.get(job.id) is job:
                del self._jobs[job.id]
            self.slot_freed.set()
            if job.has_webhook:
                self.callback_bell.set()

    def _count(self, job: ClaimedJob, outcome: Outcome, ran: timedelta) -> None:
        age = None if isinstance(outcome, Retry | Snoozed) else datetime.now(UTC) - job.created_at
        self._metrics.run_ended(job, outcome, ran=ran, age=age)
        if self._tell is not None:
            self._tell(outcome)


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _logger.error("%s could not be written down", task.get_name(), exc_info=error)
