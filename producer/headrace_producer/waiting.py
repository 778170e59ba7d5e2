"""The wait for a job's end."""

import asyncio
from contextlib import suppress
from datetime import timedelta

from headrace_producer.bells import Bells
from headrace_producer.reaching import reaching
from headrace_shared.errors import JobNotFound, ResultTimeout, StoreUnavailable
from headrace_shared.handlers import handler_of, public_lane
from headrace_shared.ids import JobId
from headrace_shared.job import Ending, Job
from headrace_shared.store import feed, jobs
from headrace_shared.store.pool import Pool

_AGAIN_SECONDS = 1.0


class Waiter:
    """Waits for jobs of one client to end."""

    def __init__(self, pool: Pool, address: str, bells: Bells) -> None:
        self._pool = pool
        self._address = address
        self._bells = bells

    async def ending(self, job_id: JobId, timeout: timedelta | None) -> Ending:
        """Return a job when it has ended; a store that goes away meanwhile is waited for as well.

        Raises:
            JobNotFound: there is no such job.
            ResultTimeout: it has not ended in time.
            StoreUnavailable: the store is away when the time is over.

        """
        seconds = timeout.total_seconds() if timeout is not None else float("inf")
        deadline = asyncio.get_running_loop().time() + seconds
        async with self._bells.bell(job_id) as bell:
            while True:
                bell.clear()
                left = deadline - asyncio.get_running_loop().time()
                try:
                    ending = await self._read(job_id)
                    if ending.job.state.ended:
                        return ending
                    if left <= 0:
                        raise await self._timed_out(ending.job, seconds)
                except StoreUnavailable:
                    if left <= 0:
                        raise
                    left = min(left, _AGAIN_SECONDS)
                await _wait(bell, left)

    async def _read(self, job_id: JobId) -> Ending:
        with reaching(self._address):
            ending = await jobs.get_ending(self._pool, job_id)
        if ending is None:
            raise JobNotFound(job_id=job_id)
        return ending

    async def _timed_out(self, job: Job, seconds: float) -> ResultTimeout:
        with reaching(self._address):
            workers = await feed.live_workers(self._pool)
        reason = f" and waits for {job.waiting_for}" if job.waiting_for else ""
        handler = handler_of(job.endpoint)
        if not workers:
            hint = ", and no worker is alive (start one with 'headrace worker')"
        elif handler is not None and not any(job.lane in worker.lanes for worker in workers):
            lane = public_lane(job.lane)
            hint = f", and no worker that is alive has the handler {handler} in the lane {lane}"
        else:
            hint = reason
        return ResultTimeout(job_id=job.id, seconds=seconds, state=job.state, hint=hint)


async def _wait(bell: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(None if seconds == float("inf") else seconds):
            await bell.wait()
