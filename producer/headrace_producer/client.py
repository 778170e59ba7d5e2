"""The client: jobs are put in here, and read out."""

from collections.abc import AsyncIterable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias
from uuid import UUID

from pydantic import BaseModel

from headrace_producer.announcing import Announcer
from headrace_producer.bells import Bells
from headrace_producer.checking import Checker, JobRequest, check_tenant
from headrace_producer.enqueue import Enqueuer
from headrace_producer.in_force import InForce
from headrace_producer.reaching import reaching
from headrace_producer.results import JobResult, result_of
from headrace_producer.retrying import Body, Retrier
from headrace_producer.waiting import Waiter
from headrace_producer.why import Why, explain
from headrace_shared.dispatch.connection import Redis
from headrace_shared.dispatch.dispatch import Dispatch, Entry
from headrace_shared.errors import ClientNotOpen, InvalidRequest, JobNotFound
from headrace_shared.ids import JobId
from headrace_shared.job import Job, JobState
from headrace_shared.servers import FindServers, configured_servers, own_servers
from headrace_shared.settings import Settings, load_settings
from headrace_shared.store import jobs
from headrace_shared.store.jobs import Attempt, Inserted
from headrace_shared.store.pool import Connection, Pool, address, open_pool

MAX_PAGE = 1000


@dataclass(frozen=True, slots=True)
class Page:
    """Some jobs, newest first."""

    jobs: Sequence[Job]
    next: JobId | None
    """What to pass as `before` for the page that follows; None when there is none."""


@dataclass(frozen=True, slots=True)
class JobHandle:
    """A job that was accepted: it survives any crash from now on."""

    id: JobId
    existed: bool
    """The idempotency key was known: this is the job it belongs to."""
    _client: "Headrace" = field(repr=False, compare=False)

    async def result(self, *, timeout: timedelta | None = None) -> JobResult:
        """Do what `Headrace.result` does."""
        return await self._client.result(self.id, timeout=timeout)

    async def get(self) -> Job:
        """Do what `Headrace.get` does."""
        return await self._client.get(self.id)

    async def cancel(self) -> bool:
        """Do what `Headrace.cancel` does."""
        return await self._client.cancel(self.id)

    async def why(self) -> Why:
        """Do what `Headrace.why` does."""
        return await self._client.why(self.id)

    async def retry(self, body: Body | None = None) -> "JobHandle":
        """Do what `Headrace.retry` does."""
        return await self._client.retry(self.id, body)


_Handles: TypeAlias = list[JobHandle]
_Attempts: TypeAlias = list[Attempt]


class Headrace:
    """A client of Headrace, to be used inside `async with`.

    ::

        async with Headrace() as headrace:
            job = await headrace.enqueue("/v1/chat/completions", {"model": ..., "messages": [...]})
            result = await job.result(timeout=timedelta(seconds=30))
    """

    def __init__(
        self,
        postgres_url: str | None = None,
        redis_url: str | None = None,
        *,
        tenant: str = "default",
        settings: Settings | None = None,
    ) -> None:
        """Prepare a client.

        Args:
            postgres_url: where Postgres is; default: HEADRACE_POSTGRES_URL, else the servers of
                the nearest `.headrace/` that run.
            redis_url: likewise, for Redis or Valkey; it may be away.
            tenant: whose jobs these are when a job does not say.
            settings: instead of the environment's.

        Raises:
            InvalidConfiguration: the environment has a HEADRACE_* variable that is wrong.
            InvalidRequest: the tenant's name is wrong.

        """
        settings = settings or load_settings()
        urls = {"postgres_url": postgres_url, "redis_url": redis_url}
        self._settings = settings.model_copy(update={name: url for name, url in urls.items() if url})
        self._tenant = check_tenant(tenant)
        self._servers: FindServers = partial(configured_servers, self._settings)
        self._stack = AsyncExitStack()
        self._opened: _Opened | None = None

    @classmethod
    def embedded(cls, directory: str | Path = ".", *, tenant: str = "default") -> Self:
        """Prepare a client with servers of its own, whose data is kept in `directory/.headrace/`.

        They are shared by all clients of that folder; the last one to leave stops them.
        """
        client = cls(tenant=tenant)
        client._servers = partial(own_servers, Path(directory))
        return client

    async def __aenter__(self) -> Self:
        """Connect.

        Raises:
            MissingSetting: nothing says where the servers are.
            StoreError: Postgres is away, too old, or not migrated.

        """
        async with AsyncExitStack() as stack:
            servers = await stack.enter_async_context(self._servers())
            pool = await open_pool(servers.postgres_url, pooler=self._settings.pooler)
            stack.push_async_callback(pool.close)
            redis = Redis(servers.redis_url)
            stack.push_async_callback(redis.close)
            checker = Checker(self._tenant, self._settings)
            self._opened = _put_together(pool, address(servers.postgres_url), redis, checker)
            stack.push_async_callback(self._opened.bells.close)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened = None
        await self._stack.aclose()

    async def enqueue(
        self,
        endpoint: str,
        body: Mapping[str, object] | bytes | str | BaseModel,
        *,
        tenant: str | None = None,
        lane: str | None = None,
        idempotency_key: str | None = None,
        webhook: str | None = None,
        metadata: Mapping[str, str] | None = None,
        delay: timedelta | None = None,
        max_attempts: int | None = None,
        run_at: datetime | None = None,
        ttl: timedelta | None = None,
        deadline: datetime | None = None,
        timeout: timedelta | None = None,
        tags: Sequence[str] = (),
        api_key: str | None = None,
        max_cost: Decimal | str | int | None = None,
        share: bool | None = None,
        connection: Connection | None = None,
    ) -> JobHandle:
        """Save a job, and return when it is safe; `JobRequest` says what the options are.

        The endpoint is a path of the provider's API, or the name of a handler of your own.

        With the caller's own asyncpg `connection`, its transaction saves the job.

        Raises:
            InvalidInput: in one of its kinds, which names the field; nothing was saved.
            IdempotencyConflict: the key belongs to a job with another body.
            StoreUnavailable: Postgres is away; a key makes it safe to try again.

        """
        request = JobRequest(
            endpoint,
            body,
            tenant,
            lane,
            idempotency_key,
            webhook,
            metadata,
            delay,
            max_attempts,
            run_at,
            ttl,
            deadline,
            timeout,
            tags,
            api_key,
            max_cost,
            share,
        )
        return (await self.enqueue_many([request], connection=connection))[0]

    async def enqueue_many(
        self,
        requests: Iterable[JobRequest] | AsyncIterable[JobRequest],
        *,
        connection: Connection | None = None,
    ) -> _Handles:
        """Save jobs in one transaction, all or none; return them in the same order.

        Raises what `enqueue` raises; a note of the exception names the request.
        """
        if isinstance(requests, AsyncIterable):
            requests = [request async for request in requests]
        inserted = await self._open.enqueuer.enqueue(list(requests), connection)
        return [self._handle(one) for one in inserted]

    async def get(self, job_id: UUID | str) -> Job:
        """Return a job as it stands.

        Raises:
            JobNotFound: there is no such job.

        """
        opened, known_id = self._open, _job_id(job_id)
        with reaching(opened.address):
            job = await jobs.get_job(opened.pool, known_id)
        if job is None:
            raise JobNotFound(job_id=known_id)
        return job

    async def result(self, job_id: UUID | str, *, timeout: timedelta | None = None) -> JobResult:
        """Wait until a job has ended, for ever or for some time, and return its answer.

        Raises:
            JobFailed: it ended without one; JobCancelled and JobExpired are kinds of it.
            ResultTimeout: it has not ended in time; it goes on all the same.
            JobNotFound: there is no such job.

        """
        return result_of(await self._open.waiter.ending(_job_id(job_id), timeout))

    async def cancel(self, job_id: UUID | str) -> bool:
        """Cancel a job: a queued one ends at once, a running one when its worker hears of it.

        Returns:
            False when it had ended already.

        Raises:
            JobNotFound: there is no such job.

        """
        opened, known_id = self._open, _job_id(job_id)
        with reaching(opened.address):
            cancellation = await jobs.cancel_job(opened.pool, known_id)
        if cancellation is None:
            raise JobNotFound(job_id=known_id)
        if cancellation.changed and cancellation.state is JobState.CANCELLED:
            await opened.announcer.ended([Entry(cancellation.queue, known_id)])
        return cancellation.changed

    async def why(self, job_id: UUID | str) -> Why:
        """Say why a job is where it is: what it waits for, who runs it, or how it ended.

        `str()` of it is a sentence; `reasons` has the numbers. It changes nothing, and works without Redis.

        Raises:
            JobNotFound: there is no such job.

        """
        opened = self._open
        with reaching(opened.address):
            return await explain(opened.pool, opened.redis, _job_id(job_id))

    async def retry(
        self, job_id: UUID | str, body: Body | None = None, *, deadline: datetime | None = None
    ) -> JobHandle:
        """Do a job again that failed, expired or was cancelled, as a new job in its place.

        The old one keeps its ending; its line of a batch and its idempotency key mean the new one
        from now on. What a handler had checkpointed is not taken over.

        Args:
            job_id: of the old one.
            body: what to ask for instead.
            deadline: when the new one must have ended; the old one's deadline holds if it has not passed.

        Raises:
            JobNotFound: there is no such job.
            NotRetriable: it has not ended, or has a result.
            AlreadyRetried: another job took its place.
            InvalidInput: the body, or the deadline, is wrong.

        """
        opened = self._open
        with reaching(opened.address):
            new = await opened.retrier.retry(_job_id(job_id), body, deadline=deadline)
        return JobHandle(new, existed=False, _client=self)

    async def attempts(self, job_id: UUID | str) -> _Attempts:
        """Return the attempts at a job that have ended, in order, and why they ended so."""
        opened = self._open
        with reaching(opened.address):
            return await jobs.list_attempts(opened.pool, _job_id(job_id))

    async def list(
        self,
        *,
        tenant: str | None = None,
        state: JobState | str | None = None,
        batch_id: UUID | None = None,
        before: UUID | None = None,
        limit: int = 100,
    ) -> Page:
        """Return a page of a tenant's jobs, newest first.

        Args:
            tenant: default: the client's.
            state: only jobs in this state.
            batch_id: only jobs of this batch.
            before: `next` of the page before.
            limit: up to 1,000.

        """
        if not 1 <= limit <= MAX_PAGE:
            raise InvalidRequest(field="limit", reason=f"must be from 1 to {MAX_PAGE:,}")
        opened = self._open
        with reaching(opened.address):
            found = await jobs.list_jobs(
                opened.pool,
                self._tenant if tenant is None else check_tenant(tenant),
                before=None if before is None else JobId(before),
                state=None if state is None else _state(state),
                batch_id=batch_id,
                limit=limit + 1,
            )
        page = found[:limit]
        return Page(page, page[-1].id if len(found) > limit else None)

    @property
    def _open(self) -> "_Opened":
        if self._opened is None:
            raise ClientNotOpen
        return self._opened

    def _handle(self, inserted: Inserted) -> JobHandle:
        return JobHandle(inserted.id, inserted.existed, self)


@dataclass(frozen=True, slots=True)
class _Opened:
    pool: Pool
    address: str
    redis: Redis
    announcer: Announcer
    enqueuer: Enqueuer
    retrier: Retrier
    bells: Bells
    waiter: Waiter


def _put_together(pool: Pool, where: str, redis: Redis, checker: Checker) -> _Opened:
    announcer = Announcer(Dispatch(redis))
    bells = Bells(pool, redis)
    return _Opened(
        pool=pool,
        address=where,
        redis=redis,
        announcer=announcer,
        enqueuer=Enqueuer(pool, where, InForce(pool), checker, announcer),
        retrier=Retrier(pool, checker, announcer),
        bells=bells,
        waiter=Waiter(pool, where, bells),
    )


def _job_id(value: UUID | str) -> JobId:
    try:
        return JobId(value if isinstance(value, UUID) else UUID(value))
    except (ValueError, AttributeError, TypeError):
        raise InvalidRequest(field="job_id", reason=f"{value!r:.64} is not a UUID") from None


def _state(state: str) -> JobState:
    try:
        return JobState(state)
    except ValueError:
        reason = f"{state!r:.64} is not one of {', '.join(JobState)}"
        raise InvalidRequest(field="state", reason=reason) from None
