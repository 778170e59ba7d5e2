"""A call of which nobody knows whether it was billed is settled by rule or by an operator, exactly once."""

import asyncio
from datetime import timedelta
from uuid import uuid4

import pytest
from command_line import Command

from headrace_shared.budgets import Budgets, Held, HoldRequest
from headrace_shared.dispatch.connection import Redis
from headrace_shared.dispatch.dispatch import Dispatch
from headrace_shared.ids import CallNumber, HoldId, JobId, Run, Tenant, WorkerId
from headrace_shared.money import ZERO, NanoUSD, format_usd
from headrace_shared.outcome import Snoozed, WaitReason
from headrace_shared.store import claims, money, runs
from headrace_shared.store.money import BudgetPolicy, WindowKind
from headrace_shared.store.pool import Pool
from headrace_shared.store.runs import Conclusion, RunEnd
from headrace_shared.store.suspense import CallName, Decision, Meant, list_suspense, settle_suspense
from headrace_shared.testing.clock import Clock
from headrace_shared.testing.endings import HELD, WORKER, End, Endings
from headrace_shared.testing.jobs import TENANT, Jobs
from headrace_shared.testing.spending import counted
from headrace_shared.usage import Usage
from headrace_workers.breaker import Breakers
from headrace_workers.configured import Configured
from headrace_workers.reaper import Reaper

pytestmark = pytest.mark.conformance

OTHER = Tenant("other")
SCOPE = f"tenant:{TENANT}"
HOUR, MINUTE = timedelta(hours=1), timedelta(minutes=1)
BILLED, FREE = Decision(None, "operator"), Decision(ZERO, "operator")


@pytest.fixture
def jobs(pool: Pool, dispatch: Dispatch) -> Jobs:
    return Jobs(pool, dispatch)


@pytest.fixture
def command(environment: None, command: Command) -> Command:
    return command


async def reaper(pool: Pool, dispatch: Dispatch, budgets: Budgets) -> Reaper:
    configured = await Configured.load(pool)
    return Reaper(
        pool, dispatch, budgets, Breakers(dispatch, configured), configured, lease=timedelta(seconds=30)
    )


async def lose(jobs: Jobs, count: int = 1, *, tenant: Tenant = TENANT) -> list[JobId]:
    """Jobs that ended without anybody knowing whether their call was billed."""
    ids = await jobs.add(count, tenant=tenant, push=False)
    await Endings(jobs.pool).end([(job_id, End.lost()) for job_id in ids])
    return ids


async def limit(budgets: Budgets, amount: int, scope: str = SCOPE) -> None:
    await budgets.set(scope, WindowKind.TOTAL, NanoUSD(amount), BudgetPolicy.WAIT)


async def fits(budgets: Budgets, amount: int) -> bool:
    [answer] = await budgets.hold([HoldRequest(HoldId(f"{uuid4()}:1:1"), NanoUSD(amount), (SCOPE,))])
    return isinstance(answer, Held)


async def booked(jobs: Jobs, redis: Redis) -> tuple[int, int]:
    """What the ledger, the sums and the counters agree on for the tenant: settled and in suspense."""
    ledger = await jobs.ledger()
    assert await jobs.spend() == ledger
    settled, suspense, _ = await counted(redis, SCOPE)
    assert ledger.get((SCOPE, "total"), (0, 0)) == (settled, suspense)
    return settled, suspense


# By an operator.


@pytest.mark.parametrize(
    ("decision", "settled"), [("--billed", HELD), ("--free", 0), ("--cost=0.000004", 4_000)]
)
async def test_an_operator_decides_and_ledger_sums_and_counters_follow(
    jobs: Jobs, redis: Redis, command: Command, *, budgets: Budgets, decision: str, settled: int
) -> None:
    [job_id] = await lose(jobs)
    await limit(budgets, 15_000)
    assert await booked(jobs, redis) == (0, HELD)
    assert not await fits(budgets, 5_001)
    done = await command("settle", job_id, decision, "--note", "the invoice of May", "--json")
    assert done.code == 0
    assert done.answer == {
        "settled": 1,
        "suspense_nano_usd": HELD,
        "cost_nano_usd": settled,
        "calls": [
            {
                "job_id": str(job_id),
                "run": 1,
                "call": 1,
                "tenant": TENANT,
                "suspense_nano_usd": HELD,
                "cost_nano_usd": settled,
            }
        ],
    }
    assert await booked(jobs, redis) == (settled, 0)
    [call] = await jobs.calls(job_id)
    assert (call["state"], call["cost_nano"], call["suspense_nano"]) == ("settled", settled, 0)
    assert call["settled_by"] == "operator: the invoice of May"
    usage = (await command("usage", "--json")).answer
    assert (usage["cost_nano_usd"], usage["suspense_nano_usd"]) == (settled, 0)
    assert not await fits(budgets, 15_001 - settled)
    assert await fits(budgets, 15_000 - settled)


async def test_who_waits_for_a_budget_goes_on_when_money_was_freed(
    jobs: Jobs, pool: Pool, budgets: Budgets, command: Command
) -> None:
    [lost] = await lose(jobs)
    await limit(budgets, HELD)
    [waiting] = await jobs.add(push=False)
    [claimed] = (await claims.claim_jobs(pool, [waiting], WorkerId("w"), MINUTE)).jobs
    snoozed = RunEnd(waiting, claimed.run, Snoozed(HOUR, WaitReason.BUDGET), 0)
    await runs.finish(pool, WorkerId("w"), 1, conclusions=[], attempts=[], ends=[snoozed])
    assert (await command("settle", lost, "--free")).code == 0
    assert [job.id for job in (await claims.claim_jobs(pool, [waiting], WorkerId("w"), MINUTE)).jobs] == [
        waiting
    ]


async def test_only_what_is_named_is_settled(jobs: Jobs, pool: Pool, command: Command) -> None:
    one, two, three = await lose(jobs, 3)
    shown = (await command("usage", "--suspense")).out
    assert all(f"{job_id}:1:1" in shown for job_id in (one, two, three))
    done = await command("settle", f"{one}:1:1", two, "--free")
    assert done.out.endswith(
        f"2 calls settled: {format_usd(NanoUSD(2 * HELD))} in suspense became $0.00 of cost.\n"
    )
    assert [row.job_id for row in await list_suspense(pool)] == [three]


async def test_all_are_settled_that_are_old_enough_or_of_a_tenant(
    jobs: Jobs, pool: Pool, command: Command, clock: Clock
) -> None:
    old = await lose(jobs, 2)
    [other] = await lose(jobs, tenant=OTHER)
    await clock.advance(2 * HOUR)
    new = await lose(jobs, 2)
    done = await command("settle", "--all", "--older-than", "1h", "--tenant", TENANT, "--billed", "--json")
    assert done.answer["settled"] == 2
    assert {row.job_id for row in await list_suspense(pool)} == {other, *new}
    assert (await jobs.calls(old[0]))[0]["settled_by"] == "operator"
    assert (await command("settle", "--all", "--free", "--json")).answer["settled"] == 3
    assert (await command("settle", "--all", "--free", "--json")).answer["settled"] == 0
    assert await jobs.spend() == await jobs.ledger()


async def test_many_are_settled_a_page_at_a_time_and_each_once(jobs: Jobs, pool: Pool) -> None:
    await lose(jobs, 7)
    pages = await asyncio.gather(*(settle_suspense(pool, Meant(), FREE, limit=3) for _ in range(4)))
    pages += await asyncio.gather(*(settle_suspense(pool, Meant(), BILLED, limit=3) for _ in range(3)))
    settled = [one for page in pages for one in page]
    assert all(len(page) <= 3 for page in pages)
    assert len(settled) == len({one.job_id for one in settled}) == 7
    assert await jobs.spend() == await jobs.ledger()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["<one>"], "Decide for one of --billed, --free and --cost DOLLARS."),
        (["<one>", "--billed", "--free"], "Decide for one of --billed, --free and --cost DOLLARS."),
        (["--free"], "Name the calls, as JOB:RUN:CALL or as JOB, or give --all."),
        (["<one>", "--all", "--free"], "Name the calls, as JOB:RUN:CALL or as JOB, or give --all."),
        (["<one>", "--older-than", "1h", "--free"], "--older-than and --tenant belong to --all."),
        (["<one>:1", "--free"], "'<one>:1' is neither JOB:RUN:CALL nor the id of a job."),
        (["<one>", "<two>:1:2", "--free"], "Nothing of <two>:1:2 is in suspense; nothing was settled."),
        (
            ["<one>", "<two>", "--cost", "0.000001"],
            "--cost is that of one call, and 2 calls would be settled",
        ),
        (["<one>", "--cost", "0.000011"], "--cost: this call cannot have cost more than $0.00001."),
        (["<one>", "--cost", "much"], "'much' is not an amount of dollars"),
        (["<one>", "--free", "--note", ""], "--note: must be 1 to 200 printable characters."),
        (["--all", "--older-than", "long", "--free"], "--older-than: must be a duration"),
    ],
)
async def test_a_decision_that_is_none_changes_nothing(
    jobs: Jobs, pool: Pool, command: Command, arguments: list[str], sentence: str
) -> None:
    one, two = await lose(jobs, 2)

    def named(text: str) -> str:
        return text.replace("<one>", str(one)).replace("<two>", str(two))

    refused = await command("settle", *map(named, arguments))
    assert refused.code == 2
    assert refused.err.startswith(f"headrace: {named(sentence)}")
    assert len(await list_suspense(pool)) == 2


async def test_counters_that_cannot_follow_at_once_are_not_believed_any_more(
    jobs: Jobs, pool: Pool, budgets: Budgets, redis: Redis
) -> None:
    [job_id] = await lose(jobs)
    await limit(budgets, 15_000)
    before = await money.current_epoch(pool)
    await settle_suspense(pool, Meant((CallName(job_id),)), FREE)
    away = Redis("unix:///nowhere/valkey.sock")
    await Budgets(pool, away).take_effect("global")
    assert await money.current_epoch(pool) > before
    await budgets.check_epoch()
    assert await booked(jobs, redis) == (0, 0)


# By rule.


@pytest.mark.parametrize(("rule", "settled"), [({}, HELD), ({"suspense_as": "free"}, 0)])
async def test_the_rule_settles_what_nobody_has_settled_in_time(
    jobs: Jobs,
    pool: Pool,
    redis: Redis,
    clock: Clock,
    *,
    budgets: Budgets,
    rule: dict[str, str],
    settled: int,
) -> None:
    await jobs.configure({"defaults": {"suspense_after": "2h", **rule}})
    [job_id] = await lose(jobs)
    await limit(budgets, 15_000)
    house = await reaper(pool, jobs.dispatch, budgets)
    await clock.advance(2 * HOUR - MINUTE)
    await house.turn()
    assert await booked(jobs, redis) == (0, HELD)
    await clock.advance(2 * MINUTE)
    await house.turn()
    assert await booked(jobs, redis) == (settled, 0)
    [call] = await jobs.calls(job_id)
    assert (call["state"], call["settled_by"]) == ("settled", "rule")
    assert await fits(budgets, 15_000 - settled)


async def test_a_day_is_what_the_rule_waits_when_nothing_is_said(
    jobs: Jobs, pool: Pool, budgets: Budgets, clock: Clock
) -> None:
    await lose(jobs)
    house = await reaper(pool, jobs.dispatch, budgets)
    await clock.advance(23 * HOUR)
    await house.turn()
    assert len(await list_suspense(pool)) == 1
    await clock.advance(2 * HOUR)
    await house.turn()
    assert await list_suspense(pool) == []


@pytest.mark.parametrize(("state", "cost"), [("answered", 700), ("failed", 0)])
async def test_an_answer_that_comes_after_the_rule_corrects_it(
    jobs: Jobs,
    pool: Pool,
    redis: Redis,
    clock: Clock,
    *,
    budgets: Budgets,
    state: str,
    cost: int,
) -> None:
    [job_id] = await lose(jobs)
    await limit(budgets, 15_000)
    await clock.advance(25 * HOUR)
    await (await reaper(pool, jobs.dispatch, budgets)).turn()
    assert await booked(jobs, redis) == (HELD, 0)
    bill = Conclusion(
        job_id,
        Run(1),
        CallNumber(1),
        state,
        MINUTE,
        status=200 if state == "answered" else 500,
        usage=Usage(9, 0, 3, 0),
        cost=NanoUSD(cost),
        answer=b"{}",
    )
    finished = await runs.finish(pool, WORKER, 3, conclusions=[bill], attempts=[], ends=[])
    assert finished.corrected == {(job_id, 1)}
    await budgets.rebuild()
    assert await booked(jobs, redis) == (cost, 0)
    [call] = await jobs.calls(job_id)
    assert (call["state"], call["settled_by"]) == (state, None)


async def test_a_worker_that_knows_nothing_does_not_undo_a_decision(jobs: Jobs, pool: Pool) -> None:
    [job_id] = await lose(jobs)
    await settle_suspense(pool, Meant(), Decision(NanoUSD(4_000), "operator"))
    unknown = Conclusion(job_id, Run(1), CallNumber(1), "suspense", MINUTE, suspense=HELD)
    finished = await runs.finish(pool, WORKER, 1, conclusions=[unknown], attempts=[], ends=[])
    assert finished.corrected == set()
    [call] = await jobs.calls(job_id)
    assert (call["state"], call["cost_nano"], call["settled_by"]) == ("settled", 4_000, "operator")
    assert await jobs.spend() == await jobs.ledger()
