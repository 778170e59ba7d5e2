"""A job that ended without a result is done again, as a new job in its place."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from uuid import UUID

from pydantic import BaseModel

from headrace_producer.announcing import Announcer
from headrace_producer.checking import Checker, JobRequest
from headrace_producer.in_force import read_snapshot
from headrace_producer.timing import check_ahead, check_moment
from headrace_shared.dispatch.dispatch import Entry
from headrace_shared.errors import AlreadyRetried, JobNotFound, NotRetriable, StoreError
from headrace_shared.ids import JobId
from headrace_shared.job import Job, JobState
from headrace_shared.store import dead_letters, jobs
from headrace_shared.store.dead_letters import NewBody, Retried
from headrace_shared.store.pool import Pool

Body = Mapping[str, object] | bytes | str | BaseModel

_TRIES = 5
_NOW = timedelta(0)


def check_retriable(job_id: JobId, state: JobState, replaced_by: UUID | None) -> None:
    """Make sure that a job can be retried.

    Raises:
        NotRetriable: it has not ended, or has a result.
        AlreadyRetried: another job took its place.

    """
    if replaced_by is not None:
        raise AlreadyRetried(job_id=job_id, replaced_by=replaced_by)
    if state not in (JobState.FAILED, JobState.EXPIRED, JobState.CANCELLED):
        raise NotRetriable(job_id=job_id, state=state)


class Retrier:
    """Retries the jobs of one store."""

    def __init__(self, pool: Pool, checker: Checker, announcer: Announcer) -> None:
        self._pool = pool
        self._checker = checker
        self._announcer = announcer

    async def retry(
        self, job_id: JobId, body: Body | None = None, *, deadline: datetime | None = None
    ) -> JobId:
        """Put a new job into the place of one, with another body if one is given; return its id.

        Raises:
            JobNotFound: there is no such job.
            NotRetriable: it has not ended, or has a result.
            AlreadyRetried: another job took its place.
            InvalidInput: the body, or the deadline, is wrong.

        """
        deadline = None if deadline is None else check_moment("deadline", deadline)
        check_ahead("deadline", deadline)
        for _ in range(_TRIES):
            job = await self._retriable(job_id)
            new_body = None if body is None else await self._checked(job, body)
            for one in await self._retry([job_id], new_body, deadline):
                return one.new
        raise StoreError(reason="others change the configuration all the time; try again")

    async def retry_many(self, ids: Sequence[JobId], *, deadline: datetime | None = None) -> list[Retried]:
        """Put new jobs into the places of those that can be retried, in one transaction."""
        return await self._retry(ids, None, deadline)

    async def _retriable(self, job_id: JobId) -> Job:
        job = await jobs.get_job(self._pool, job_id)
        if job is None:
            raise JobNotFound(job_id=job_id)
        check_retriable(job_id, job.state, job.replaced_by)
        return job

    async def _checked(self, job: Job, body: Body) -> NewBody:
        snapshot = await read_snapshot(self._pool)
        new = self._checker.check(JobRequest(job.endpoint, body), snapshot, None)
        return NewBody(new.body, new.digest, new.route, snapshot.version, new.needs)

    async def _retry(
        self, ids: Sequence[JobId], new_body: NewBody | None, deadline: datetime | None
    ) -> list[Retried]:
        retried = await dead_letters.retry_jobs(self._pool, ids, new_body=new_body, deadline=deadline)
        await self._announcer.enqueued([(Entry(one.queue, one.new), _NOW) for one in retried])
        return retried
