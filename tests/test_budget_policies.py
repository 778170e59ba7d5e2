"""What becomes of jobs that do not fit: they wait, fail, go to a cheaper target, or go all the same."""

import asyncio
from datetime import timedelta

import pytest
from command_line import Command

from headrace_producer import Headrace
from headrace_shared.budgets import Budgets
from headrace_shared.dispatch import keys
from headrace_shared.dispatch.connection import Redis
from headrace_shared.dispatch.dispatch import Dispatch
from headrace_shared.errors import InvalidInput
from headrace_shared.ids import Tenant, WorkerId
from headrace_shared.job import JobState
from headrace_shared.money import NanoUSD
from headrace_shared.outcome import ErrorClass, WaitReason
from headrace_shared.store import claims
from headrace_shared.store.money import BudgetPolicy, WindowKind
from headrace_shared.store.pool import Pool
from headrace_shared.testing.behaviour import Behaviour
from headrace_shared.testing.jobs import Jobs, eventually
from headrace_shared.testing.scripted_provider import ScriptedProvider, completion
from headrace_shared.testing.simulated_provider import SimulatedProvider
from headrace_workers.breaker import Breakers
from headrace_workers.choosing import Choosing
from headrace_workers.configured import Configured
from headrace_workers.execution import Run
from headrace_workers.steps.downgrade import Downgrade
from headrace_workers.steps.hold import Hold
from headrace_workers.steps.route import Route
from headrace_workers.testing import running_worker

pytestmark = pytest.mark.usefixtures("environment")

DEAR, CHEAP = 10_000, 1_000
"""Nano-USD of a token that is written; what is read costs nothing."""
MOST = 20
BODY = {"max_completion_tokens": MOST, "messages": [{"role": "user", "content": "Hello"}]}
CHAT = {"model": "dear", **BODY}
PATH = "/v1/chat/completions"
ROUTE = {
    "targets": [{"provider": "openai", "model": "dear"}],
    "fallbacks": [{"on": ["rate_limited"], "provider": "openai", "model": "cheap"}],
}
CONFIGURATION = {
    "routes": {"either": ROUTE},
    "prices": {
        "openai/dear": {"input": "0", "output": "10"},
        "openai/cheap": {"input": "0", "output": "1"},
    },
}
ACME = Tenant("acme")
SECONDS = timedelta(seconds=20)


@pytest.fixture
async def jobs(pool: Pool, dispatch: Dispatch) -> Jobs:
    jobs = Jobs(pool, dispatch)
    await jobs.configure(CONFIGURATION)
    return jobs


def limit(tokens: int, price: int = DEAR) -> NanoUSD:
    return NanoUSD(tokens * price)


async def test_a_call_that_does_not_fit_goes_to_the_next_target_that_does(
    jobs: Jobs, budgets: Budgets, scripted: ScriptedProvider
) -> None:
    """Room for one call of the dear target and three of the cheap one, at their worst."""
    scripted.script(completion(completion_tokens=MOST))
    amount = NanoUSD(MOST * (DEAR + 3 * CHEAP))
    await budgets.set("model:either", WindowKind.TOTAL, amount, BudgetPolicy.DOWNGRADE)
    async with running_worker(concurrency=1):
        ids = await jobs.add(5, model="either", body=BODY)
        endings = await jobs.ended(ids)
    answered = [ending.answer.model for ending in endings if ending.answer]
    assert sorted(answered) == ["cheap", "cheap", "cheap", "dear"]
    failed = [ending.job for ending in endings if ending.answer is None]
    assert [job.error_class for job in failed] == [ErrorClass.BUDGET_EXHAUSTED]
    assert (await jobs.spend())["model:either", "total"] == (amount, 0)
    assert await jobs.spend() == await jobs.ledger()


async def test_a_cheaper_target_that_is_full_is_waited_for_without_a_slot(
    jobs: Jobs, budgets: Budgets, silent: ScriptedProvider
) -> None:
    """The dear one does not fit: there is nowhere else to go, and least of all back to it, for ever."""
    silent.script(completion(completion_tokens=MOST))
    await jobs.configure({**CONFIGURATION, "limits": {"openai/cheap": {"concurrent": 1}}})
    await budgets.set("model:either", WindowKind.TOTAL, limit(2 * MOST, CHEAP), BudgetPolicy.DOWNGRADE)
    async with running_worker():
        [first] = await jobs.add(1, model="either", body=BODY)
        await silent.arrived(1)
        [second] = await jobs.add(1, model="either", body=BODY)
        await jobs.until(second, lambda row: row["waiting_for"] == WaitReason.LIMIT)
        silent.open.set()
        endings = await jobs.ended([first, second])
    assert [ending.answer.model for ending in endings if ending.answer] == ["cheap", "cheap"]


async def test_a_large_job_keeps_no_small_ones_back_where_money_is_about_to_be_released(
    jobs: Jobs, budgets: Budgets, silent: ScriptedProvider
) -> None:
    """Half is spent, half is held by a call that will cost little: only the large one waits for tomorrow."""

    def job(most: int) -> dict[str, object]:
        return {**BODY, "max_completion_tokens": most}

    await budgets.set("model:dear", WindowKind.DAY, limit(30), BudgetPolicy.WAIT)
    silent.script(completion(completion_tokens=15), completion(completion_tokens=1))
    silent.open.set()
    async with running_worker():
        await jobs.ended(await jobs.add(1, model="dear", body=job(15)))
        silent.open.clear()
        under_way = await jobs.add(1, model="dear", body=job(15))
        await silent.arrived(2)
        [large] = await jobs.add(1, model="dear", body=job(20))
        await jobs.until(large, lambda row: row["waiting_for"] == WaitReason.BUDGET)
        small = await jobs.add(1, model="dear", body=job(5))
        silent.open.set()
        endings = await jobs.ended([*under_way, *small])
        assert (await jobs.row(large))["state"] == JobState.QUEUED
    assert {ending.job.state for ending in endings} == {JobState.SUCCEEDED}


async def test_a_call_that_is_interrupted_while_its_money_is_held_gives_it_back_at_once(
    jobs: Jobs, budgets: Budgets, dispatch: Dispatch
) -> None:
    await budgets.set("global", WindowKind.TOTAL, limit(MOST), BudgetPolicy.WAIT)
    [job_id] = await jobs.add(1, model="dear", body=BODY)
    [job] = (await claims.claim_jobs(jobs.pool, [job_id], WorkerId("w"), SECONDS)).jobs
    configured = await Configured.load(jobs.pool)
    choosing = Choosing(configured, Breakers(dispatch, configured))
    run = await Route(configured, choosing)(Run.of(job))
    step = Hold(budgets, dispatch, Downgrade(configured, choosing))
    holding = asyncio.ensure_future(step(run))
    await asyncio.sleep(0)
    holding.cancel()
    await asyncio.wait([holding])
    await eventually(lambda: step(run), lambda again: again.held is not None)


async def test_without_the_policy_no_other_target_is_asked(
    jobs: Jobs, budgets: Budgets, scripted: ScriptedProvider
) -> None:
    await budgets.set("model:either", WindowKind.TOTAL, limit(MOST, CHEAP), BudgetPolicy.WAIT)
    async with running_worker():
        (ending,) = await jobs.ended(await jobs.add(1, model="either", body=BODY))
    assert ending.job.error_class == ErrorClass.BUDGET_EXHAUSTED
    assert "the total budget of model:either lacks" in (ending.job.error or "")
    assert scripted.requests == []


async def test_rejection_waits_for_calls_under_way_that_may_release_enough(
    jobs: Jobs, budgets: Budgets, silent: ScriptedProvider
) -> None:
    silent.script(completion(completion_tokens=3))
    await budgets.set("tag:x", WindowKind.DAY, limit(MOST + 3), BudgetPolicy.REJECT)
    async with Headrace() as client, running_worker():
        first = await client.enqueue(PATH, CHAT, tags=["x"])
        await jobs.until(first.id, lambda row: row["state"] == "running")
        second = await client.enqueue(PATH, CHAT, tags=["x"])
        row = await jobs.until(second.id, lambda row: row["waiting_for"] == WaitReason.BUDGET)
        assert row["state"] == JobState.QUEUED
        silent.open.set()
        endings = await jobs.ended([first.id, second.id])
        assert {ending.job.state for ending in endings} == {JobState.SUCCEEDED}
        third = await client.enqueue(PATH, CHAT, tags=["x"])
        (ending,) = await jobs.ended([third.id])
    assert ending.job.error_class == ErrorClass.BUDGET_EXHAUSTED


async def test_a_soft_budget_stops_nobody(jobs: Jobs, budgets: Budgets, scripted: ScriptedProvider) -> None:
    await budgets.set("key:ci", WindowKind.TOTAL, NanoUSD(1), BudgetPolicy.SOFT)
    async with Headrace() as client, running_worker():
        job = await client.enqueue(PATH, CHAT, api_key="ci")
        (ending,) = await jobs.ended([job.id])
    assert ending.job.state == JobState.SUCCEEDED
    (view,) = await budgets.view()
    assert (view.state.scope, view.state.settled) == ("key:ci", 3 * DEAR)


@pytest.mark.parametrize(("scope", "gate"), [("model:dear", "route:dear"), ("key:ci", "key:ci")])
async def test_a_spent_scope_closes_the_gate_of_its_own_queues_and_no_other(
    jobs: Jobs, budgets: Budgets, redis: Redis, scripted: ScriptedProvider, *, scope: str, gate: str
) -> None:
    await budgets.set(scope, WindowKind.DAY, limit(MOST), BudgetPolicy.WAIT)
    scripted.script(completion(completion_tokens=MOST))
    async with running_worker():
        await jobs.ended(await jobs.add(1, model="dear", api_key="ci", body=BODY))
        (waiting,) = await jobs.add(1, model="dear", api_key="ci", body=BODY)
        await jobs.until(waiting, lambda row: row["waiting_for"] == WaitReason.BUDGET)
        assert list(await redis.hash(keys.GATES)) == [f"{gate}|budget"]
        (ending,) = await jobs.ended(await jobs.add(1, model="cheap", body=BODY))
        assert ending.job.state == JobState.SUCCEEDED
        untouched = await jobs.add(20, model="dear", api_key="ci", body=BODY)
        await jobs.ended(await jobs.add(1, model="cheap", body=BODY))
        assert {(await jobs.row(job_id))["run"] for job_id in untouched} == {0}
        await budgets.set(scope, WindowKind.DAY, limit(22 * MOST), BudgetPolicy.WAIT)
        endings = await jobs.ended([waiting, *untouched])
    assert {ending.job.state for ending in endings} == {JobState.SUCCEEDED}


async def test_a_limit_that_is_raised_while_a_call_is_refused_lets_its_job_go(
    jobs: Jobs, budgets: Budgets, scripted: ScriptedProvider, pool: Pool
) -> None:
    """Nobody would open a gate that is closed after that, or wake a job that is put back after that."""
    await budgets.set("model:dear", WindowKind.DAY, limit(MOST), BudgetPolicy.WAIT)
    scripted.script(completion(completion_tokens=MOST))
    async with running_worker():
        await jobs.ended(await jobs.add(1, model="dear", body=BODY))
        async with pool.acquire() as connection, connection.transaction():
            await connection.execute("LOCK TABLE headrace.budget_refusals IN SHARE MODE")
            late = await jobs.add(1, model="dear", body=BODY)
            await eventually(lambda: noting_a_refusal(pool), bool)
            await budgets.set("model:dear", WindowKind.DAY, limit(9 * MOST), BudgetPolicy.WAIT)
        (ending,) = await jobs.ended(late)
    assert ending.job.state == JobState.SUCCEEDED


async def noting_a_refusal(pool: Pool) -> bool:
    """Whether a worker was refused money and cannot go on yet."""
    row = await pool.fetchrow(
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE wait_event_type = 'Lock' AND query LIKE '%INSERT INTO headrace.budget_refusals%'"
    )
    return bool(row and row[0])


async def test_a_job_costs_no_more_than_it_may_in_all_its_calls(
    jobs: Jobs, scripted: ScriptedProvider
) -> None:
    """An answer that nobody can read may have cost its worst case: there is no second one."""
    scripted.script(completion(completion_tokens=MOST))
    async with Headrace() as client, running_worker():
        enough = await client.enqueue(PATH, CHAT, max_cost="0.0002")
        little = await client.enqueue(PATH, CHAT, max_cost="0.000199999")
        endings = await jobs.ended([enough.id, little.id])
    assert [ending.job.state for ending in endings] == [JobState.SUCCEEDED, JobState.FAILED]
    assert endings[0].bill.cost == limit(MOST)
    assert endings[1].job.error_class == ErrorClass.BUDGET_EXHAUSTED
    assert "what this job may cost lacks $0.000000001" in (endings[1].job.error or "")
    assert len(scripted.requests) == 1


async def test_a_call_in_suspense_counts_for_its_job(jobs: Jobs, provider: SimulatedProvider) -> None:
    provider.behave(Behaviour(garbage=1))
    await jobs.configure({**CONFIGURATION, "retries": {"initial": "1ms", "maximum": "1ms"}})
    async with Headrace() as client, running_worker():
        job = await client.enqueue(PATH, CHAT, max_cost="0.0005")
        (ending,) = await jobs.ended([job.id])
    assert ending.job.error_class == ErrorClass.BUDGET_EXHAUSTED
    assert provider.books.total.requests == 2
    assert ending.bill.suspense == limit(2 * MOST)


async def test_max_cost_that_is_no_amount_is_refused(headrace: Headrace) -> None:
    for wrong in ("much", "-1", "1e-10"):
        with pytest.raises(InvalidInput, match="max_cost"):
            await headrace.enqueue(PATH, {**CHAT, "model": "gpt-4o-mini"}, max_cost=wrong)


async def test_a_batch_stops_at_what_it_may_cost(
    jobs: Jobs, command: Command, scripted: ScriptedProvider, pool: Pool
) -> None:
    """Its requests may write 1,024 tokens each and write 100: the money of five, and not of six."""
    await jobs.configure({"prices": {"openai/gpt-4o-mini": {"input": "0", "output": "10"}}})
    scripted.script(completion(completion_tokens=100))
    epoch = await pool.fetchval("SELECT epoch FROM headrace.money")
    async with running_worker(concurrency=4):
        done = await command.submit(40, "--max-cost", "0.0147", "--tag", "x", "--wait", "--json")
        views = {view.state.scope: view for view in await Budgets(pool, jobs.dispatch.redis).view()}
    assert done.code == 1
    assert "could cost up to $0.4096" in done.err
    assert (done.answer["succeeded"], done.answer["failed"]) == (5, 35)
    assert done.answer["cost_nano_usd"] == limit(500)
    assert views[f"batch:{done.answer['batch_id']}"].state.settled == limit(500)
    assert (await jobs.spend())["tag:x", "total"] == (limit(500), 0)
    assert len(scripted.requests) == 5
    # The first hold puts counters in place; the budget of a new batch does not.
    assert await pool.fetchval("SELECT epoch FROM headrace.money") <= epoch + 2


async def test_a_budget_is_used_up_and_not_passed(
    jobs: Jobs, budgets: Budgets, provider: SimulatedProvider
) -> None:
    """The money of 200 jobs, 600 jobs, 100 at a time; answers are of half to all that is held for them."""
    await jobs.configure({**CONFIGURATION, "defaults": {"max_output_tokens": MOST}})
    amount = limit(200 * 17)
    await budgets.set("tenant:acme", WindowKind.TOTAL, amount, BudgetPolicy.WAIT)
    provider.behave(Behaviour(output_tokens=MOST, latency=timedelta(milliseconds=20)))
    async with running_worker(concurrency=100):
        ids = await jobs.add(600, model="dear", tenant=ACME)
        endings = await jobs.ended(ids, within=timedelta(seconds=90))
    billed = provider.books.total.completion_tokens * DEAR
    assert billed <= amount
    assert billed >= 0.99 * amount
    assert (await jobs.spend())["tenant:acme", "total"] == (billed, 0)
    failed = [ending.job for ending in endings if ending.job.state == JobState.FAILED]
    assert {job.error_class for job in failed} == {ErrorClass.BUDGET_EXHAUSTED}
    assert len(failed) + provider.books.total.answered == 600
