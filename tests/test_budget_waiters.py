"""Jobs that were put back until a budget's window turns go on when the budget is changed."""

from datetime import timedelta

import pytest

from headrace_shared.budgets import Budgets
from headrace_shared.dispatch.dispatch import Dispatch, Entry
from headrace_shared.ids import JobId, Lane, RouteName, Tenant, WorkerId, new_job_id
from headrace_shared.job import ClaimedJob, NewJob, Queue
from headrace_shared.money import NanoUSD
from headrace_shared.outcome import Snoozed, WaitReason
from headrace_shared.request import Endpoint
from headrace_shared.store import claims, jobs, runs
from headrace_shared.store.money import BudgetPolicy, WindowKind
from headrace_shared.store.pool import Pool

pytestmark = pytest.mark.conformance

WORKER = WorkerId("test")
MINUTE = timedelta(minutes=1)
LANES = {Lane("default"): 1}


def queue(tenant: str) -> Queue:
    return Queue(Lane("default"), RouteName("gpt-4o-mini"), Tenant(tenant))


async def put_back(pool: Pool, dispatch: Dispatch, tenant: str, reason: WaitReason) -> JobId:
    """A job that ran, and now waits for the rest of the day."""
    where = queue(tenant)
    job = NewJob(
        id=new_job_id(),
        tenant=where.tenant,
        lane=where.lane,
        route=where.route,
        endpoint=Endpoint.CHAT_COMPLETIONS,
        body=b"{}",
        max_attempts=6,
    )
    await jobs.insert_jobs(pool, [job], configuration=0, keep_keys=MINUTE)
    [claimed] = (await claims.claim_jobs(pool, [job.id], WORKER, MINUTE)).jobs
    await runs.finish(pool, WORKER, 1, conclusions=[], attempts=[], ends=[snoozed(claimed, reason)])
    await dispatch.finish([(Entry(where, job.id), timedelta(hours=9))])
    return job.id


def snoozed(job: ClaimedJob, reason: WaitReason) -> runs.RunEnd:
    return runs.RunEnd(job.id, job.run, Snoozed(timedelta(hours=9), reason), 0)


async def due(dispatch: Dispatch) -> set[JobId]:
    return {entry.id for entry in (await dispatch.claim(100, LANES, MINUTE, MINUTE)).entries}


@pytest.mark.parametrize(("scope", "woken"), [("tenant:acme", {"acme"}), ("global", {"acme", "other"})])
async def test_a_changed_budget_wakes_who_waits_for_it(
    pool: Pool, dispatch: Dispatch, budgets: Budgets, scope: str, woken: set[str]
) -> None:
    waiting = {name: await put_back(pool, dispatch, name, WaitReason.BUDGET) for name in ("acme", "other")}
    retrying = await put_back(pool, dispatch, "acme", WaitReason.RETRY)
    assert await due(dispatch) == set()
    await budgets.set(scope, WindowKind.DAY, NanoUSD(10**9), BudgetPolicy.WAIT)
    found = await due(dispatch)
    assert found == {waiting[name] for name in woken}
    claimed = await claims.claim_jobs(pool, [*found, retrying], WORKER, MINUTE)
    assert {job.id for job in claimed.jobs} == found
