"""Why a job is where it is: each thing that it can wait for, with its numbers."""

from datetime import UTC, datetime, timedelta
from typing import cast
from unittest.mock import ANY
from uuid import uuid4

import pytest
from command_line import Command

from headrace_producer import Headrace
from headrace_producer.reasons import (
    BreakerIsOpen,
    BudgetIsSpent,
    CapIsReached,
    HasEnded,
    IsNext,
    IsPaused,
    IsRunning,
    LimitIsReached,
    NobodyServes,
    NotDue,
    RanOutOfTime,
    Reason,
    RunsAlone,
    WaitsForASlot,
    WaitsItsTurn,
)
from headrace_producer.why import Why, explain
from headrace_shared.budgets import Budgets
from headrace_shared.configuration import Configuration
from headrace_shared.dispatch import breakers, limits
from headrace_shared.dispatch.connection import Redis
from headrace_shared.dispatch.dispatch import Claim, Dispatch
from headrace_shared.dispatch.limits import AdmitRequest, Report
from headrace_shared.errors import JobNotFound
from headrace_shared.ids import JobId, Lane, Tenant, WorkerId, new_job_id
from headrace_shared.job import JobState
from headrace_shared.limits import Allowance, LimitKind, Told, limiter_name
from headrace_shared.money import NanoUSD
from headrace_shared.outcome import WaitReason
from headrace_shared.pauses import Pauses
from headrace_shared.routes import Target
from headrace_shared.store import claims, feed, pauses
from headrace_shared.store.money import BudgetPolicy, WindowKind
from headrace_shared.store.pool import Pool
from headrace_shared.testing.clock import Clock
from headrace_shared.testing.endings import End, Endings
from headrace_shared.testing.jobs import LANE, MODEL, TENANT, Jobs
from headrace_shared.testing.scripted_provider import ScriptedProvider
from headrace_workers.testing import running_worker

ME = WorkerId("me")
SECOND = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)
TARGET = Target("openai", MODEL)


@pytest.fixture
def jobs(pool: Pool, dispatch: Dispatch) -> Jobs:
    return Jobs(pool, dispatch)


@pytest.fixture
async def worker(pool: Pool) -> WorkerId:
    """A worker that is alive and serves the lane, with two slots."""
    await feed.register_worker(pool, ME, host="here", slots=2, lanes=(LANE,), alive=timedelta(days=9))
    return ME


@pytest.fixture
def ask(pool: Pool, redis: Redis) -> "Ask":
    return Ask(pool, redis)


class Ask:
    """Asks why; what is returned stood alone in the answer."""

    def __init__(self, pool: Pool, redis: Redis) -> None:
        self._pool = pool
        self._redis = redis

    async def __call__(self, job_id: JobId) -> Why:
        return await explain(self._pool, self._redis, job_id)

    async def one(self, job_id: JobId) -> Reason:
        [reason] = (await self(job_id)).reasons
        return reason


async def test_a_job_that_nothing_is_in_the_way_of_is_next(worker: WorkerId, jobs: Jobs, ask: Ask) -> None:
    [job_id] = await jobs.add()
    why = await ask(job_id)
    assert why.reasons == (IsNext(0, 2),)
    assert why.sentence == f"Job {job_id} is claimed next: 0 of 2 slots are taken."
    assert why.expected == timedelta(0)


async def test_it_waits_for_its_turn_behind_those_of_its_queue_alone(
    worker: WorkerId, pool: Pool, jobs: Jobs, ask: Ask
) -> None:
    ids = await jobs.add(5)
    await jobs.add(3, tenant=Tenant("other"))
    await jobs.add(3, delay=MINUTE)
    last = (await jobs.add(1))[0]
    await claims.claim_jobs(pool, ids[:2], worker, MINUTE)
    why = await ask(last)
    assert why.reasons == (WaitsItsTurn(3, 2, 2, None),)
    assert "3 jobs of its queue are before it, and 2 of 2 slots are taken" in why.sentence
    assert why.expected is None


async def test_the_time_of_its_turn_is_told_from_how_its_queue_went_of_late(
    worker: WorkerId, pool: Pool, jobs: Jobs, ask: Ask, clock: Clock
) -> None:
    done = await jobs.add(10)
    waiting = sorted(await jobs.add(5))
    await claims.claim_jobs(pool, done, worker, timedelta(days=1))
    await pool.execute(
        "UPDATE headrace.jobs SET state = 'cancelled', ended_at = headrace.now(), lease_until = NULL,"
        " worker = NULL WHERE state = 'running'"
    )
    await clock.advance(timedelta(seconds=100))
    reason = await ask.one(waiting[-1])
    assert isinstance(reason, WaitsItsTurn)
    assert reason.before == 4
    # Ten in a hundred seconds: the five take fifty.
    assert reason.left is not None
    assert abs(reason.left - timedelta(seconds=50)) < timedelta(seconds=20)
    await clock.advance(timedelta(minutes=10))
    assert await ask.one(waiting[-1]) == WaitsItsTurn(4, 0, 2, None)


async def test_the_first_of_its_queue_waits_for_a_slot(
    worker: WorkerId, pool: Pool, jobs: Jobs, ask: Ask
) -> None:
    ids = await jobs.add(2, tenant=Tenant("other"))
    [job_id] = await jobs.add()
    await claims.claim_jobs(pool, ids, worker, MINUTE)
    why = await ask(job_id)
    assert why.reasons == (WaitsForASlot(2, 2),)
    assert "waits for a slot: it is the next of its queue, and 2 of 2 slots are taken" in why.sentence


async def test_without_a_worker_that_serves_it_it_waits_for_one(pool: Pool, jobs: Jobs, ask: Ask) -> None:
    [job_id] = await jobs.add()
    assert await ask.one(job_id) == NobodyServes(LANE, None, 0)
    assert "none is alive" in (await ask(job_id)).sentence
    await feed.register_worker(pool, ME, host="here", slots=2, lanes=("batch",), alive=MINUTE)
    assert await ask.one(job_id) == NobodyServes(LANE, None, 1)
    [own] = await jobs.add(lane=Lane("default@sum"), model="handler:sum")
    await pool.execute("UPDATE headrace.jobs SET endpoint = 'handler:sum' WHERE id = $1", own)
    assert "none has the handler sum in the lane default" in (await ask(own)).sentence


async def test_a_job_that_is_due_later_says_when_and_why(
    worker: WorkerId, pool: Pool, jobs: Jobs, ask: Ask
) -> None:
    [job_id] = await jobs.add(delay=timedelta(hours=1))
    reason = await ask.one(job_id)
    assert isinstance(reason, NotDue)
    assert (reason.put_back_for, timedelta(minutes=59) < reason.left <= timedelta(hours=1)) == (None, True)
    assert "it is not due before" in (await ask(job_id)).sentence
    for wait in WaitReason:
        await pool.execute(
            "UPDATE headrace.jobs SET waiting_for = $2, attempts = 2 WHERE id = $1", job_id, wait
        )
        why = await ask(job_id)
        assert cast("NotDue", why.reasons[0]).put_back_for is wait
        assert ("2 of at most 6 failed" in why.sentence) == (wait is WaitReason.RETRY)
    await pool.execute("UPDATE headrace.jobs SET waiting_for = 'what is to come' WHERE id = $1", job_id)
    assert cast("NotDue", await ask.one(job_id)).put_back_for is None


@pytest.mark.parametrize("scope", ["global", f"lane:{LANE}", f"tenant:{TENANT}", f"model:{MODEL}"])
async def test_a_paused_job_says_what_is_paused_since_when_and_until_when(
    worker: WorkerId, jobs: Jobs, ask: Ask, scope: str
) -> None:
    pool, dispatch = jobs.pool, jobs.dispatch
    [job_id] = await jobs.add()
    await pauses.pause(pool, "tenant:somebody-else", None)
    made = await Pauses(pool, dispatch).pause(scope, MINUTE)
    reason = await ask.one(job_id)
    assert isinstance(reason, IsPaused)
    assert (reason.scope, reason.since, reason.until) == (scope, made.since, made.until)
    why = await ask(job_id)
    assert (
        f"{'everything' if scope == 'global' else scope} is paused, since {made.since:%Y-%m-%d}"
        in why.sentence
    )
    assert timedelta(0) < (why.expected or timedelta(0)) <= MINUTE
    await Pauses(pool, dispatch).resume(scope)
    assert await ask.one(job_id) == IsNext(0, 2)


async def test_an_open_breaker_says_how_many_calls_failed_and_when_a_probe_goes(
    worker: WorkerId, jobs: Jobs, redis: Redis, ask: Ask
) -> None:
    [job_id] = await jobs.add()
    await breakers.open_(redis, TARGET, MINUTE, None)
    await breakers.record(redis, TARGET, timedelta(seconds=30), 1, 3)
    reason = await ask.one(job_id)
    assert isinstance(reason, BreakerIsOpen)
    assert (reason.target, reason.targets, reason.failed, reason.calls) == (TARGET, 1, 3, 4)
    assert timedelta(seconds=30) < (reason.left or timedelta(0)) <= MINUTE
    assert "3 of 4 calls failed" in (await ask(job_id)).sentence


async def test_a_breaker_that_is_open_by_hand_says_so(
    environment: None, worker: WorkerId, jobs: Jobs, ask: Ask, command: Command
) -> None:
    [job_id] = await jobs.add()
    await command("breakers", "open", str(TARGET))
    why = await ask(job_id)
    assert f"the breaker of {TARGET}: opened by hand, until it is closed by hand" in why.sentence
    assert why.expected is None


async def test_a_route_waits_only_when_none_of_its_targets_is_called(
    worker: WorkerId, jobs: Jobs, redis: Redis, ask: Ask
) -> None:
    two = [Target("openai", "gpt-4o"), TARGET]
    targets = [{"provider": one.provider, "model": one.model} for one in two]
    await jobs.configure({"routes": {"either": {"targets": targets}}})
    [job_id] = await jobs.add(model="either")
    await breakers.open_(redis, two[0], 2 * MINUTE, None)
    assert await ask.one(job_id) == IsNext(0, 2)
    await breakers.open_(redis, two[1], MINUTE, None)
    reason = await ask.one(job_id)
    assert isinstance(reason, BreakerIsOpen)
    assert (reason.target, reason.targets) == (two[1], 2)


async def test_a_spent_budget_says_its_numbers_what_is_needed_and_when_it_turns(
    worker: WorkerId, jobs: Jobs, pool: Pool, budgets: Budgets, ask: Ask
) -> None:
    [job_id] = await jobs.add()
    await budgets.set(f"tenant:{TENANT}", WindowKind.DAY, NanoUSD(1000), BudgetPolicy.WAIT)
    await budgets.set("tenant:other", WindowKind.DAY, NanoUSD(0), BudgetPolicy.WAIT)
    await budgets.set("global", WindowKind.TOTAL, NanoUSD(10**9), BudgetPolicy.WAIT)
    reason = await ask.one(job_id)
    assert isinstance(reason, BudgetIsSpent)
    assert (reason.scope, reason.kind, reason.limit) == (f"tenant:{TENANT}", WindowKind.DAY, 1000)
    assert reason.remaining == 1000
    assert (reason.needs or 0) > 1000
    assert timedelta(0) < (reason.left or timedelta(0)) <= timedelta(days=1)
    assert "waits for the day budget of tenant:acme: of $0.000001" in (await ask(job_id)).sentence
    await budgets.set(f"tenant:{TENANT}", WindowKind.DAY, NanoUSD(10**9), BudgetPolicy.WAIT)
    assert await ask.one(job_id) == IsNext(0, 2)


async def test_a_budget_that_only_counts_holds_nobody(
    worker: WorkerId, jobs: Jobs, budgets: Budgets, ask: Ask
) -> None:
    [job_id] = await jobs.add()
    await budgets.set("global", WindowKind.TOTAL, NanoUSD(0), BudgetPolicy.SOFT)
    assert await ask.one(job_id) == IsNext(0, 2)


async def test_a_spent_budget_keeps_no_call_back_that_costs_nothing(
    worker: WorkerId, jobs: Jobs, budgets: Budgets, ask: Ask
) -> None:
    await jobs.configure({"prices": {str(TARGET): {"input": 0, "output": 0}}})
    [job_id] = await jobs.add()
    await budgets.set("global", WindowKind.TOTAL, NanoUSD(0), BudgetPolicy.WAIT)
    assert await ask.one(job_id) == IsNext(0, 2)
    # A handler says what its calls cost when it makes them: some room there must be.
    await jobs.pool.execute("UPDATE headrace.jobs SET endpoint = 'handler:sum' WHERE id = $1", job_id)
    reasons = (await ask(job_id)).reasons
    assert [one.needs for one in reasons if isinstance(one, BudgetIsSpent)] == [None]


async def admit(redis: Redis, target: Target, count: int = 1, *, tokens: int = 100) -> None:
    asked = [AdmitRequest(f"{new_job_id()}/1/1", target, 0, tokens) for _ in range(count)]
    assert await limits.admit(redis, 1, asked) is not None, "another version is published"


async def limit(jobs: Jobs, document: dict[str, object]) -> None:
    version = await jobs.configure(document)
    await limits.publish(jobs.dispatch.redis, version, Configuration.from_document(document))


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("limiter", [str(TARGET), "openai"])
async def test_a_limit_of_requests_or_tokens_says_how_much_is_used_and_when_the_next_call_goes(
    jobs: Jobs, redis: Redis, ask: Ask, clock: Clock, limiter: str
) -> None:
    [job_id] = await jobs.add()
    await limit(jobs, {"limits": {limiter: {"requests_per_minute": 30, "tokens_per_minute": 6000}}})
    assert await ask.one(job_id) == IsNext(0, 2)
    await admit(redis, TARGET, tokens=1000)
    assert cast("LimitIsReached", await ask.one(job_id)).what == "tokens"
    await clock.advance(20 * SECOND)
    await admit(redis, TARGET)
    await limits.report(redis, [Report(limiter_name(limiter), answered=1, tokens=100, reserved=100)])
    reason = await ask.one(job_id)
    assert isinstance(reason, LimitIsReached)
    assert (reason.limiter, reason.what, reason.limit, reason.used) == (limiter, "requests", 30, 12)
    assert SECOND < (reason.left or timedelta(0)) <= 2.1 * SECOND
    why = await ask(job_id)
    assert f"waits for the limit of {limiter}: 12 requests a minute of late, of 30; " in why.sentence
    assert why.expected == cast("LimitIsReached", why.reasons[0]).left
    assert await Dispatch(redis).claim(9, {LANE: 1}, MINUTE, MINUTE) == Claim([], ANY, 0)


async def test_a_limit_whose_calls_were_refused_says_until_when_and_what_is_left_of_it(
    worker: WorkerId, jobs: Jobs, redis: Redis, ask: Ask, clock: Clock
) -> None:
    [job_id] = await jobs.add()
    await limit(jobs, {"limits": {str(TARGET): {"requests_per_minute": 600}}})
    await admit(redis, TARGET, 3)
    name = limits.limiter_of(TARGET)
    await limits.report(redis, [Report(name, refused={LimitKind.REQUESTS: 1}, wait=10 * SECOND)])
    reason = await ask.one(job_id)
    assert isinstance(reason, LimitIsReached)
    assert (reason.what, reason.limit) == ("cooling", None)
    assert 5 * SECOND < (reason.left or timedelta(0)) <= 10 * SECOND
    assert f"waits for the limit of {TARGET}: it refused a call; the next call may go" in str(
        await ask(job_id)
    )
    await clock.advance(10 * SECOND)
    assert await ask.one(job_id) == IsNext(0, 2)
    left = Told(Allowance(500, remaining=60, whole_in=MINUTE))
    await limits.report(redis, [Report(name, answered=1, told=left)])
    await admit(redis, TARGET, 5)
    reason = await ask.one(job_id)
    assert isinstance(reason, LimitIsReached)
    assert (reason.what, reason.limit, reason.in_force) == ("requests", 500, 60)
    assert "a minute of late, of 500, of which 60 are in force; the next call may go" in str(
        await ask(job_id)
    )


async def test_a_limit_of_calls_at_a_time_says_how_many_are_under_way(
    worker: WorkerId, jobs: Jobs, redis: Redis, ask: Ask
) -> None:
    first, second = sorted(await jobs.add(2))
    await limit(jobs, {"limits": {"openai": {"concurrent": 2}}})
    await admit(redis, TARGET)
    assert await ask.one(first) == IsNext(0, 2)
    await admit(redis, TARGET)
    why = await ask(first)
    assert why.reasons == (LimitIsReached("openai", 1, "concurrent", 2, 2, 2, None),)
    assert "waits for the limit of openai: 2 calls under way, of 2." in why.sentence
    reasons = (await ask(second)).reasons
    assert reasons == (*why.reasons, WaitsItsTurn(1, 0, 2, None))


async def test_a_route_waits_for_limits_only_when_all_of_its_targets_do(
    worker: WorkerId, jobs: Jobs, redis: Redis, ask: Ask
) -> None:
    two = [Target("openai", "gpt-4o"), TARGET]
    targets = [{"provider": one.provider, "model": one.model} for one in two]
    ceilings = {str(two[0]): {"requests_per_minute": 2}, str(two[1]): {"requests_per_minute": 6}}
    await limit(jobs, {"routes": {"either": {"targets": targets}}, "limits": ceilings})
    [job_id] = await jobs.add(model="either")
    await admit(redis, two[0])
    assert await ask.one(job_id) == IsNext(0, 2)
    await admit(redis, two[1])
    reason = await ask.one(job_id)
    assert isinstance(reason, LimitIsReached)
    assert (reason.limiter, reason.targets, reason.limit) == (str(two[1]), 2, 6)
    assert f"waits for the limit of its 2 targets, {two[1]} first: " in str(await ask(job_id))


@pytest.mark.usefixtures("environment")
async def test_a_tenant_that_runs_as_many_as_it_may_says_so_with_the_numbers(
    jobs: Jobs, silent: ScriptedProvider, ask: Ask
) -> None:
    await jobs.configure({"tenants": {TENANT: {"concurrent": 2}}})
    async with running_worker():
        ids = sorted(await jobs.add(4))
        await silent.arrived(2)
        first, last = [one for one in ids if (await jobs.row(one))["state"] == "queued"]
        [other] = await jobs.add(tenant=Tenant("other"), lane=Lane("batch"))
        await silent.arrived(3)
        assert (await ask(first)).reasons == (CapIsReached(f"tenant:{TENANT}", 2, 2, None),)
        assert f"waits because tenant:{TENANT} runs 2 jobs, of 2 that it may at a time." in str(
            await ask(first)
        )
        assert [type(one) for one in (await ask(last)).reasons] == [CapIsReached, WaitsItsTurn]
        silent.open.set()
        await jobs.ended([*ids, other])


@pytest.mark.usefixtures("environment")
async def test_a_key_that_runs_as_many_as_it_may_says_so_beside_its_tenant(
    jobs: Jobs, silent: ScriptedProvider, ask: Ask
) -> None:
    await jobs.configure({"tenants": {TENANT: {"concurrent": 3}}, "keys": {"ci": {"concurrent": 2}}})
    async with running_worker():
        ids = sorted(await jobs.add(3, api_key="ci"))
        await silent.arrived(2)
        [waiting] = [one for one in ids if (await jobs.row(one))["state"] == "queued"]
        why = await ask(waiting)
        assert why.reasons == (CapIsReached("key:ci", 2, 2, None),)
        assert "waits because key:ci runs 2 jobs, of 2 that it may at a time." in why.sentence
        plain = await jobs.add()
        await silent.arrived(3)
        assert (await ask(waiting)).reasons == (
            CapIsReached(f"tenant:{TENANT}", 3, 3, None),
            CapIsReached("key:ci", 2, 2, None),
        )
        silent.open.set()
        await jobs.ended([*ids, *plain])


async def test_several_reasons_are_all_said_and_the_last_to_end_is_expected(
    worker: WorkerId, pool: Pool, dispatch: Dispatch, jobs: Jobs, ask: Ask
) -> None:
    [job_id] = await jobs.add(delay=MINUTE)
    await Pauses(pool, dispatch).pause("global", timedelta(hours=1))
    await pool.execute("UPDATE headrace.jobs SET crashes = 2")
    why = await ask(job_id)
    assert [type(reason) for reason in why.reasons] == [NotDue, IsPaused, RunsAlone]
    assert why.expected is None
    await pool.execute("UPDATE headrace.jobs SET crashes = 0")
    expected = (await ask(job_id)).expected
    assert expected is not None
    assert timedelta(minutes=59) < expected <= timedelta(hours=1)


async def test_a_job_that_ran_out_of_time_says_so(worker: WorkerId, pool: Pool, jobs: Jobs, ask: Ask) -> None:
    [job_id] = await jobs.add()
    await pool.execute("UPDATE headrace.jobs SET end_by = headrace.now() - interval '1 second'")
    assert isinstance(await ask.one(job_id), RanOutOfTime)


async def test_a_running_job_says_where_since_when_and_which_call_is_out(
    environment: None, jobs: Jobs, ask: Ask, silent: ScriptedProvider
) -> None:
    async with running_worker() as worker:
        [job_id] = await jobs.add()
        await silent.arrived(1)
        reason = await ask.one(job_id)
        assert isinstance(reason, IsRunning)
        assert (reason.worker, reason.run) == (worker.worker_id, 1)
        assert reason.call is not None
        assert reason.call.target == TARGET
        assert timedelta(0) < reason.lease_left <= timedelta(seconds=5)
        assert f"its call to {TARGET} has been out for" in (await ask(job_id)).sentence
        silent.open.set()
        await jobs.ended([job_id])


async def test_a_run_that_lost_its_worker_says_so(
    worker: WorkerId, pool: Pool, jobs: Jobs, ask: Ask, clock: Clock
) -> None:
    [job_id] = await jobs.add()
    await claims.claim_jobs(pool, [job_id], worker, MINUTE)
    await clock.advance(2 * MINUTE)
    assert "its lease ended" in (await ask(job_id)).sentence


async def test_a_job_that_has_ended_says_how(pool: Pool, jobs: Jobs, ask: Ask) -> None:
    good, bad = await jobs.add(2)
    await Endings(pool).end([(good, End.answered(b"{}")), (bad, End.lost())])
    assert " succeeded at " in (await ask(good)).sentence
    reason = await ask.one(bad)
    assert isinstance(reason, HasEnded)
    assert (reason.state, reason.error_class) == (JobState.FAILED, "timeout")


async def test_without_redis_it_says_what_the_store_knows_and_that_the_rest_is_not_known(
    worker: WorkerId, pool: Pool, budgets: Budgets, jobs: Jobs
) -> None:
    [job_id] = await jobs.add()
    await budgets.set("global", WindowKind.TOTAL, NanoUSD(1), BudgetPolicy.WAIT)
    await pauses.pause(pool, "global", None)
    away = Redis("redis://127.0.0.1:1")
    try:
        why = await explain(pool, away, job_id)
    finally:
        await away.close()
    assert [type(reason) for reason in why.reasons] == [IsPaused, BudgetIsSpent]
    assert why.sentence.endswith("Redis cannot be reached: limits and breakers are not known.")


async def test_it_changes_nothing(worker: WorkerId, pool: Pool, redis: Redis, jobs: Jobs, ask: Ask) -> None:
    [job_id] = await jobs.add()
    await breakers.open_(redis, TARGET, MINUTE, None)
    before = await changes(redis)
    await ask(job_id)
    assert await changes(redis) == before


async def changes(redis: Redis) -> int:
    """How many writes the server has seen."""
    info = cast("dict[str, int]", await redis.administer("INFO", "persistence"))
    return info["rdb_changes_since_last_save"]


async def test_the_client_and_the_command_say_the_same(
    worker: WorkerId, headrace: Headrace, command: Command, jobs: Jobs
) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
    job = await headrace.enqueue("/v1/chat/completions", body)
    why = await job.why()
    assert (await command("why", job.id)).out == f"{why}\n"
    answer = (await command("why", job.id, "--json")).answer
    assert (answer["status"], answer["expected_seconds"]) == ("queued", 0)
    assert answer["reasons"] == [
        {"reason": "next", "running": 0, "slots": 2, "words": "is claimed next: 0 of 2 slots are taken"}
    ]
    with pytest.raises(JobNotFound):
        await headrace.why(uuid4())
    assert (await command("why", uuid4())).code == 2
    assert "not the id of a job" in (await command("why", "job-17")).err


@pytest.mark.usefixtures("environment", "worker")
async def test_of_a_batch_its_next_job_is_explained(pool: Pool, command: Command) -> None:
    batch_id = (await command.submit(3, "--json")).answer["batch_id"]
    first, *others = [row["id"] for row in await pool.fetch("SELECT id FROM headrace.jobs ORDER BY line")]
    await Endings(pool).end([(first, End.answered(b"{}"))])
    done = await command("why", batch_id)
    said, why = done.out.splitlines()
    assert said == f"Batch {batch_id}: 1 of 3 done, 0 running, 2 waiting. The next of them:"
    assert why.startswith(f"Job {others[0]} ")
    answer = (await command("why", batch_id, "--json")).answer
    assert (answer["batch_id"], answer["job_id"]) == (batch_id, str(others[0]))
    await Endings(pool).end_batch(str(batch_id), lambda _: End.answered(b"{}"))
    ended = await command("why", batch_id)
    assert ended.code == 2
    assert f"Batch {batch_id} waits for nothing" in ended.err


@pytest.mark.usefixtures("environment", "worker")
async def test_all_parts_can_be_carried_by_json(command: Command, budgets: Budgets, jobs: Jobs) -> None:
    [job_id] = await jobs.add(delay=MINUTE)
    await budgets.set("global", WindowKind.TOTAL, NanoUSD(1), BudgetPolicy.WAIT)
    await Pauses(jobs.pool, jobs.dispatch).pause("global")
    await breakers.open_(jobs.dispatch.redis, TARGET, MINUTE, None)
    reasons = (await command("why", job_id, "--json")).rows("reasons")
    assert [one["reason"] for one in reasons] == ["run_at", "pause", "breaker", "budget"]
    assert datetime.fromisoformat(str(reasons[1]["since"])) <= datetime.now(UTC)
    assert (reasons[1]["left_seconds"], reasons[3]["limit_nano_usd"]) == (None, 1)
    assert reasons[2]["target"] == str(TARGET)
