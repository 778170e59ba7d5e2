"""What a job spends from, and budgets that begin beside those that are there."""

from datetime import timedelta
from uuid import UUID

import pytest
from test_budget_holds import Interrupted

from headrace_shared.allowance import Allowance
from headrace_shared.budgets import Budgets
from headrace_shared.dispatch import keys
from headrace_shared.dispatch.connection import Redis
from headrace_shared.errors import InvalidInput
from headrace_shared.ids import BatchId, JobId, Lane, RouteName, Run, Tenant, WorkerId, new_job_id
from headrace_shared.job import BatchLine, ClaimedJob, NewJob
from headrace_shared.money import ZERO, NanoUSD
from headrace_shared.outcome import Snoozed, WaitReason
from headrace_shared.request import Endpoint
from headrace_shared.scopes import batch_scope, check_tags, parse_scope, scopes_of
from headrace_shared.store import claims, jobs, money, runs
from headrace_shared.store.money import BudgetPolicy, WindowKind
from headrace_shared.store.pool import Pool
from headrace_shared.testing.clock import Clock, script
from headrace_shared.testing.spending import Spender, counted, flush

pytestmark = pytest.mark.conformance

MINUTE = timedelta(minutes=1)
WORKER = WorkerId("w")
TOTAL, WAIT = WindowKind.TOTAL, BudgetPolicy.WAIT
BATCH = BatchId(UUID(int=17))
CALL = (
    "INSERT INTO headrace.calls (job_id, run, call, tenant, endpoint, provider, model, hold_id, held_nano, \
held_at, scopes, epoch, price_version, opened_at, state, ended_at, cost_nano, suspense_nano, answer) \
VALUES ($1, 1, $2, 'acme', '', 'openai', 'm', $2::int::text, 50, now(), '{}', 1, '', now(), $3, \
CASE WHEN $3 <> 'open' THEN now() END, $4, $5, '')"
)


async def claimed(pool: Pool) -> ClaimedJob:
    job = NewJob(
        id=new_job_id(),
        tenant=Tenant("acme"),
        lane=Lane("default"),
        route=RouteName("gpt-4o-mini"),
        endpoint=Endpoint.CHAT_COMPLETIONS,
        body=b"{}",
        max_attempts=6,
        api_key="ci",
        tags=("team=a", "x"),
        batch_line=BatchLine(BATCH, 1, "1"),
        max_cost=NanoUSD(500),
    )
    await jobs.insert_jobs(pool, [job], configuration=0, keep_keys=MINUTE)
    return await claim(pool, job.id)


async def claim(pool: Pool, job_id: JobId) -> ClaimedJob:
    (job,) = (await claims.claim_jobs(pool, [job_id], WORKER, MINUTE)).jobs
    return job


async def test_a_job_spends_from_all_of_its_scopes_in_a_fixed_order(pool: Pool) -> None:
    job = await claimed(pool)
    assert scopes_of(job, RouteName("gpt-4o")) == (
        "global",
        "tenant:acme",
        "key:ci",
        "model:gpt-4o",
        f"batch:{BATCH}",
        "tag:team=a",
        "tag:x",
    )
    assert job.allowance == Allowance(NanoUSD(500))


async def test_a_later_run_knows_what_the_earlier_ones_cost_or_may_cost(pool: Pool) -> None:
    job = await claimed(pool)
    for number, state, cost, suspense in (
        (1, "answered", 7, 0),
        (2, "suspense", 0, 11),
        (3, "open", 0, 0),
        (4, "failed", 0, 0),
    ):
        await pool.execute(CALL, job.id, number, state, cost, suspense)
    await pool.execute(
        "UPDATE headrace.jobs SET state = 'queued', worker = NULL, lease_until = NULL WHERE id = $1", job.id
    )
    again = await claim(pool, job.id)
    assert again.run == 2
    assert again.allowance == Allowance(NanoUSD(500), NanoUSD(7 + 11 + 50))


def test_an_allowance_is_shared_by_calls_at_the_same_time() -> None:
    allowance = Allowance(NanoUSD(100), spent=NanoUSD(10))
    assert allowance.hold(NanoUSD(60)) == ZERO
    assert allowance.hold(NanoUSD(31)) == 1
    assert allowance.hold(NanoUSD(30)) == ZERO
    allowance.settle(NanoUSD(60), NanoUSD(5))
    assert (allowance.spent, allowance.held) == (15, 30)
    assert allowance.hold(NanoUSD(56)) == 1
    assert allowance.hold(NanoUSD(55)) == ZERO


async def test_a_worker_that_knows_no_ceilings_leaves_the_job_to_others(pool: Pool) -> None:
    job = NewJob(
        new_job_id(),
        Tenant("acme"),
        Lane("default"),
        RouteName("m"),
        Endpoint.CHAT_COMPLETIONS,
        b"{}",
        6,
        max_cost=NanoUSD(1),
    )
    await jobs.insert_jobs(pool, [job], configuration=0, keep_keys=MINUTE)
    before = claims.Abilities(needs=("expiry",))
    assert (await claims.claim_jobs(pool, [job.id], WORKER, MINUTE, abilities=before)).jobs == []


@pytest.mark.parametrize(
    ("scope", "kind"),
    [("model:gpt-4o", TOTAL), ("tag:x", TOTAL), ("global", WindowKind.WEEK), ("tenant:a", TOTAL)],
)
async def test_the_version_before_makes_no_call_while_there_is_a_budget_that_it_does_not_know(
    pool: Pool, budgets: Budgets, scope: str, kind: WindowKind
) -> None:
    await budgets.set(scope, kind, NanoUSD(5), WAIT)
    epoch = await money.current_epoch(pool)
    assert await pool.fetchval("SELECT headrace.is_in_force($1)", epoch)
    assert await pool.fetchval("SELECT headrace.epoch_holds($1)", epoch) == (scope == "tenant:a")


async def test_counters_of_the_version_before_are_put_in_place_anew(
    pool: Pool, budgets: Budgets, redis: Redis
) -> None:
    spender = await Spender.start(pool)
    await budgets.set("tag:x", WindowKind.WEEK, NanoUSD(5), WAIT)
    await spender.refused(budgets, 6, "tag:x")
    unknown = ["format", "limit|tag:x|week", "window|week", "end|week"]
    await redis.evaluate(script("return redis.call('HDEL', unpack(ARGV))"), (), [keys.MONEY, *unknown])
    await spender.refused(budgets, 6, "tag:x")
    await spender.hold(budgets, 5, "tag:x")


async def test_a_soft_budget_counts_and_refuses_nothing(pool: Pool, budgets: Budgets, redis: Redis) -> None:
    spender = await Spender.start(pool)
    await budgets.set("tag:x", TOTAL, NanoUSD(5), BudgetPolicy.SOFT)
    call = await spender.open(budgets, 90, "global", "tag:x")
    assert await counted(redis, "tag:x") == (0, 0, 90)
    await budgets.settle([await spender.conclude(call, cost=80)])
    (view,) = await budgets.view()
    assert (view.state.policy, view.state.settled, view.remaining) == (BudgetPolicy.SOFT, 80, -75)


async def test_a_budget_begins_beside_the_others_under_the_same_epoch(
    pool: Pool, budgets: Budgets, redis: Redis
) -> None:
    spender, elsewhere = await Spender.start(pool), Budgets(pool, redis)
    scope = batch_scope(BATCH)
    await budgets.set("global", TOTAL, NanoUSD(100), WAIT)
    held = await spender.hold(elsewhere, 10, "global")
    epoch = await money.current_epoch(pool)
    await budgets.begin(scope, NanoUSD(30))
    assert await money.current_epoch(pool) == epoch
    assert await spender.intend(held)
    assert (await spender.refused(elsewhere, 31, "global", scope)).scope == scope
    await spender.open(elsewhere, 30, "global", scope)
    await flush(redis)
    assert (await spender.refused(elsewhere, 1, "global", scope)).held_by_others == 30


async def test_a_budget_that_begins_while_counters_are_missing_holds_as_well(
    pool: Pool, budgets: Budgets, redis: Redis
) -> None:
    spender, elsewhere = await Spender.start(pool), Budgets(pool, redis)
    await spender.hold(elsewhere, 1, "global")
    await flush(redis)
    await budgets.begin("tag:new", NanoUSD(30))
    assert (await spender.refused(elsewhere, 31, "tag:new")).missing == 1


async def test_a_budget_that_begins_while_a_rebuild_has_read_holds_as_well(
    pool: Pool, budgets: Budgets, redis: Redis
) -> None:
    """The counters that the rebuild puts in place were read before the budget was there."""
    spender, elsewhere = await Spender.start(pool), Budgets(pool, redis)
    await spender.hold(elsewhere, 1, "global")

    async def nothing() -> None:
        pass

    async def begin() -> None:
        await budgets.begin("tag:new", NanoUSD(30))

    await Budgets(Interrupted(pool, nothing, begin), redis).rebuild()
    assert (await spender.refused(elsewhere, 31, "tag:new")).missing == 1


@pytest.mark.parametrize(
    ("scope", "woken"),
    [
        ("global", True),
        ("key:ci", True),
        ("key:other", False),
        ("model:gpt-4o-mini", True),
        ("model:m", False),
        (batch_scope(BATCH), True),
        ("tag:x", True),
        ("tag:y", False),
    ],
)
async def test_who_waits_for_a_scope_is_woken_by_it_and_nobody_else(
    pool: Pool, clock: Clock, scope: str, *, woken: bool
) -> None:
    job = await claimed(pool)
    end = runs.RunEnd(job.id, Run(1), Snoozed(MINUTE, WaitReason.BUDGET), 0)
    await runs.finish(pool, WORKER, 1, conclusions=[], attempts=[], ends=[end])
    assert bool(await money.wake_waiters(pool, scope, limit=10)) is woken


@pytest.mark.parametrize(
    "scope", ["global", "tenant:a", "key:ci", "model:o/4|x", batch_scope(BATCH), "tag:a:"]
)
def test_a_scope_is_read_as_it_is_written(scope: str) -> None:
    assert parse_scope(scope) == scope


@pytest.mark.parametrize(
    "text",
    ["", "global:", "tenant:", "tenant:a b", "batch:7", "tag:a b", "tag:", "model: ", "lane:x"],
)
def test_what_is_no_scope_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        parse_scope(text)


def test_tags_are_sorted_and_each_counts_once() -> None:
    assert check_tags(["b", "a", "b"]) == ("a", "b")
    for tags in ("abc", ["a|b"], ["x" * 65], [str(n) for n in range(9)], [""], ["a\nb"]):
        with pytest.raises(InvalidInput):
            check_tags(tags)
