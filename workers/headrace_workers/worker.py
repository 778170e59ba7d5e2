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
from collections.abc import Coroutine
from datetime import timedelta
from signal import Signals

from arq.connections import ArqRedis
from arq.worker import Worker as ArqWorker
from arq.worker import func

from headrace_shared.errors import DispatchUnavailable
from headrace_shared.ids import WorkerId
from headrace_shared.logs import Occasional
from headrace_shared.outcome import Failed, Outcome, Retry, Snoozed, Succeeded
from headrace_shared.store.pool import UNREACHABLE
from headrace_workers.claiming import Claiming
from headrace_workers.reach import Reach
from headrace_workers.running import Running
from headrace_workers.suspects import Suspects

_logger = logging.getLogger(__name__)
_occasionally = Occasional(_logger)

_MAX_PAUSE = 2.0


async def run_job(ctx: dict[object, object], *args: object, **kwargs: object) -> None:
    """Stand for a job's work where arq asks for a function; the row says what the work is."""
    del ctx, args, kwargs


class Worker(ArqWorker):
    """Claims jobs in bulk, runs as many at a time as it has slots, and never ends for an outage.

    Args:
        redis_url: for arq's own connections, which carry its health record.
        worker_id: under which rows are claimed.
        slots: jobs that run at a time.
        lease: what arq takes for the longest run.
        drain: how long running jobs may take to end once it is told to stop.
        reach: says whether there is Redis to claim from.
        claiming: fills the slots.
        running: the jobs in them.
        suspects: the jobs beside them, each with a slot as well.

    """

    def __init__(
        self,
        *,
        redis_url: str,
        worker_id: WorkerId,
        slots: int,
        lease: timedelta,
        drain: timedelta,
        reach: Reach,
        claiming: Claiming,
        running: Running,
        suspects: Suspects,
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
        self.claiming = claiming
        self.running = running
        self._drain = drain
        self._reach = reach
        self._suspects = suspects
        self._draining = asyncio.Event()
        self._pause = 0.05
        running.tell(self._tally)

    @property
    def draining(self) -> bool:
        return self._draining.is_set()

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
            self.running.slot_freed.clear()
            await self._first_of(self.running.slot_freed.wait())
            return True
        if self._reach.without_redis:
            found = await self.claiming.fill_from_store(free)
            if found or not self.burst or self._busy():
                await self._first_of(self.claiming.rest())
            return found
        claim = await self.claiming.fill(free)
        if not claim.entries and (not self.burst or self._busy()):
            await self._first_of(self.claiming.wait_for_work(claim))
        return bool(claim.entries)

    def _busy(self) -> int:
        return len(self.running) + len(self._suspects)

    def _tally(self, outcome: Outcome) -> None:
        self.jobs_retried += isinstance(outcome, Retry | Snoozed)
        self.jobs_failed += isinstance(outcome, Failed)
        self.jobs_complete += isinstance(outcome, Succeeded)

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
        await self.running.until_ended(self._drain)
        await self._suspects.until_ended(timedelta(seconds=deadline - time.monotonic()))
        self.give_back()
        await self.running.until_ended()
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
        self.running.give_back()
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
