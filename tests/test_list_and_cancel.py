"""Jobs are listed in pages, and cancelled wherever they are."""

import asyncio
from datetime import timedelta
from uuid import uuid4

import pytest

from headrace_producer import Headrace, JobRequest, JobState
from headrace_shared.dispatch.dispatch import Dispatch
from headrace_shared.errors import InvalidRequest, JobCancelled, JobNotFound
from headrace_shared.ids import Lane, WorkerId
from headrace_shared.outcome import ErrorClass, Failed, Failure
from headrace_shared.store import claims, runs
from headrace_shared.store.pool import Pool

pytestmark = pytest.mark.conformance

CHAT = "/v1/chat/completions"
BODY = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello"}]}
MINUTE = timedelta(minutes=1)
WORKER = WorkerId("worker-1")


async def test_pages_show_every_job_once_newest_first(headrace: Headrace) -> None:
    handles = await headrace.enqueue_many([JobRequest(CHAT, BODY)] * 25)
    await headrace.enqueue(CHAT, BODY, tenant="acme")
    sizes: list[int] = []
    seen: list[object] = []
    page = await headrace.list(limit=10)
    while True:
        sizes.append(len(page.jobs))
        seen += [job.id for job in page.jobs]
        if page.next is None:
            break
        page = await headrace.list(limit=10, before=page.next)
    assert sizes == [10, 10, 5]
    assert seen == sorted((handle.id for handle in handles), reverse=True)


async def test_a_full_last_page_has_no_next(headrace: Headrace) -> None:
    await headrace.enqueue_many([JobRequest(CHAT, BODY)] * 3)
    assert (await headrace.list(limit=3)).next is None
    assert (await headrace.list(limit=2)).next is not None


async def test_a_list_shows_one_state_or_tenant(headrace: Headrace) -> None:
    kept, cancelled = await headrace.enqueue_many([JobRequest(CHAT, BODY)] * 2)
    other = await headrace.enqueue(CHAT, BODY, tenant="acme")
    await cancelled.cancel()
    assert [job.id for job in (await headrace.list(state="queued")).jobs] == [kept.id]
    assert [job.id for job in (await headrace.list(state=JobState.CANCELLED)).jobs] == [cancelled.id]
    assert [job.id for job in (await headrace.list(tenant="acme")).jobs] == [other.id]
    assert (await headrace.list(batch_id=uuid4())).jobs == []


@pytest.mark.parametrize("limit", [0, 1001, -1])
async def test_a_wrong_limit_or_state_is_refused(headrace: Headrace, limit: int) -> None:
    with pytest.raises(InvalidRequest, match=r"^limit: must be from 1 to 1,000"):
        await headrace.list(limit=limit)
    with pytest.raises(InvalidRequest, match=r"^state: 'done' is not one of queued, running"):
        await headrace.list(state="done")


async def test_a_queued_job_is_cancelled_at_once(headrace: Headrace, dispatch: Dispatch) -> None:
    handle = await headrace.enqueue(CHAT, BODY)
    waiting = asyncio.create_task(handle.result(timeout=MINUTE))
    assert await handle.cancel()
    with pytest.raises(JobCancelled):
        await waiting
    job = await handle.get()
    assert (job.state, job.error) == (JobState.CANCELLED, "cancelled before it ran")
    assert (await dispatch.claim(10, {Lane("default"): 1}, MINUTE, MINUTE)).entries == []
    assert not await handle.cancel()


async def test_a_running_job_is_asked_to_stop(headrace: Headrace, pool: Pool) -> None:
    handle = await headrace.enqueue(CHAT, BODY)
    (job,) = (await claims.claim_jobs(pool, [handle.id], WORKER, MINUTE)).jobs
    assert await headrace.cancel(str(handle.id))
    assert (await handle.get()).state is JobState.RUNNING
    assert await claims.heartbeat(pool, [job]) == [claims.Kept(job.id, cancel_requested=True)]


async def test_there_is_nothing_to_cancel_or_get_of_no_job(headrace: Headrace) -> None:
    with pytest.raises(JobNotFound):
        await headrace.cancel(uuid4())
    with pytest.raises(JobNotFound):
        await headrace.get(uuid4())


async def test_attempts_tell_how_each_ended(headrace: Headrace, pool: Pool) -> None:
    handle = await headrace.enqueue(CHAT, BODY)
    assert await headrace.attempts(handle.id) == []
    (job,) = (await claims.claim_jobs(pool, [handle.id], WORKER, MINUTE)).jobs
    records = [
        runs.AttemptRecord(job.id, job.run, 1, None, "retried", ErrorClass.RATE_LIMITED, "429"),
        runs.AttemptRecord(job.id, job.run, 2, None, "failed", ErrorClass.AUTH, "401"),
    ]
    end = runs.RunEnd(job.id, job.run, Failed(Failure(ErrorClass.AUTH, "401")), attempts=2)
    await runs.finish(pool, WORKER, 0, conclusions=[], attempts=records, ends=[end])
    found = [(one.number, one.outcome, one.error_class, one.error) for one in await headrace.attempts(job.id)]
    assert found == [(1, "retried", "rate_limited", "429"), (2, "failed", "auth", "401")]
