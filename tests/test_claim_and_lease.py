"""A claim is a run and a lease; who loses it can end nothing, and what it held comes back."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeAlias

import pytest

from headrace_shared.allowance import Allowance
from headrace_shared.budgets import Budgets, Held, HoldRequest
from headrace_shared.dispatch import keys
from headrace_shared.dispatch.connection import Redis
from headrace_shared.dispatch.dispatch import Dispatch, Entry
from headrace_shared.ids import CallNumber, JobId, RouteName, Run, Tenant, WorkerId, hold_id, new_job_id
from headrace_shared.job import ClaimedJob, JobState, Queue
from headrace_shared.money import NanoUSD
from headrace_shared.outcome import ErrorClass, Outcome, Snoozed, Succeeded, WaitReason
from headrace_shared.scopes import GLOBAL, scopes_of
from headrace_shared.settings import load_settings
from headrace_shared.store import claims, lost, runs
from headrace_shared.store.money import BudgetPolicy, WindowKind
from headrace_shared.store.pool import Pool
from headrace_shared.store.runs import AttemptRecord, Conclusion, Intent, RunEnd
from headrace_shared.testing.clock import Clock, script
from headrace_shared.testing.jobs import LANE, MODEL, TENANT, Jobs, eventually
from headrace_shared.testing.scripted_provider import ScriptedProvider
from headrace_shared.usage import Usage
from headrace_workers.configured import Configured
from headrace_workers.finisher import Finish, Finisher
from headrace_workers.heartbeat import Heartbeat
from headrace_workers.leases import Leases
from headrace_workers.reaper import Reaper
from headrace_workers.suspects import Suspects
from headrace_workers.testing import running_worker

pytestmark = [pytest.mark.conformance, pytest.mark.usefixtures("environment")]

LEASE = timedelta(seconds=30)
DEAD = WorkerId("dead")
QUEUE = Queue(LANE, RouteName(MODEL), TENANT)
AMOUNT = NanoUSD(5_000)
COST = NanoUSD(1_200)
FIRST = CallNumber(1)


@pytest.fixture
def jobs(pool: Pool, dispatch: Dispatch) -> Jobs:
    return Jobs(pool, dispatch)


@dataclass(frozen=True, slots=True)
class Doomed:
    """What a worker leaves behind that dies while its call is out."""

    pool: Pool
    redis: Redis
    budgets: Budgets
    jobs: Jobs
    reaper: Reaper

    async def claim(self, job_id: JobId, *, alone: bool = False) -> ClaimedJob:
        taken = await claims.claim_jobs(self.pool, [job_id], DEAD, LEASE, alone=alone)
        (job,) = taken.jobs
        return job

    async def intend(self, job: ClaimedJob) -> tuple[int, Intent]:
        """Hold money for a call: its epoch, and the intent that is to be written under it."""
        scopes = scopes_of(job, job.queue.route)
        (held,) = await self.budgets.hold([HoldRequest(hold_id(job.id, job.run, FIRST), AMOUNT, scopes)])
        assert isinstance(held, Held)
        intent = Intent(job.id, job.run, FIRST, "openai", MODEL, held.id, AMOUNT, held.at, scopes, "test")
        return held.epoch, replace(intent, has_allowance=job.allowance is not None)

    async def open_call(self, job: ClaimedJob) -> None:
        epoch, intent = await self.intend(job)
        assert await runs.open_calls(self.pool, epoch, [intent]) == {(job.id, intent.call)}

    async def crash(self, job_id: JobId, *, alone: bool = False) -> ClaimedJob:
        job = await self.claim(job_id, alone=alone)
        await self.open_call(job)
        return job


@pytest.fixture
async def doomed(pool: Pool, redis: Redis, budgets: Budgets, jobs: Jobs, reaper: Reaper) -> Doomed:
    await budgets.set("global", WindowKind.TOTAL, NanoUSD(1_000_000), BudgetPolicy.REJECT)
    return Doomed(pool, redis, budgets, jobs, reaper)


def answered(job: ClaimedJob) -> Conclusion:
    return Conclusion(
        job.id,
        job.run,
        FIRST,
        "answered",
        timedelta(seconds=1),
        status=200,
        usage=Usage(9, 0, 3, 0),
        cost=COST,
        answer=b"{}",
    )


async def finish(pool: Pool, job: ClaimedJob) -> object:
    finished = await runs.finish(
        pool,
        DEAD,
        1,
        conclusions=[answered(job)],
        attempts=[AttemptRecord(job.id, job.run, 1, FIRST, "succeeded")],
        ends=[RunEnd(job.id, job.run, Succeeded(), 0, (job.run, FIRST))],
    )
    return finished.states


async def give_back(pool: Pool, job: ClaimedJob) -> object:
    """As a worker does that shuts down."""
    end = RunEnd(job.id, job.run, Snoozed(timedelta(0), WaitReason.SHUTDOWN), job.attempts)
    return (await runs.finish(pool, DEAD, 1, conclusions=[], attempts=[], ends=[end])).states


async def lease_in_redis(redis: Redis, job_id: JobId) -> float | None:
    """Seconds until an id is due again; None when it is not in its queue."""
    score = await redis.evaluate(
        script(
            "local time, score = redis.call('TIME'), redis.call('ZSCORE', ARGV[1], ARGV[2]) "
            "local shift = redis.call('GET', 'headrace:clock') or '0' "
            "return score and tostring((score - shift) / 1000 - time[1])"
        ),
        (),
        [keys.QUEUE + keys.queue_name(QUEUE), str(job_id)],
    )
    return float(score) if isinstance(score, bytes) else None


async def test_each_claim_raises_the_run(pool: Pool, jobs: Jobs, doomed: Doomed) -> None:
    (job_id,) = await jobs.add()
    first = await doomed.claim(job_id)
    assert (await claims.claim_jobs(pool, [job_id], DEAD, LEASE)).jobs == []
    assert await give_back(pool, first) == {(job_id, first.run): JobState.QUEUED}
    second = await doomed.claim(job_id)
    assert (first.run, second.run) == (1, 2)
    row = await jobs.row(job_id)
    assert (row["attempts"], row["crashes"]) == (0, 0)


async def test_what_is_not_due_is_not_claimed(pool: Pool, jobs: Jobs, clock: Clock) -> None:
    (job_id,) = await jobs.add(delay=timedelta(minutes=1))
    assert (await claims.claim_jobs(pool, [job_id], DEAD, LEASE)).jobs == []
    await clock.advance(timedelta(minutes=1, seconds=1))
    assert [job.id for job in (await claims.claim_jobs(pool, [job_id], DEAD, LEASE)).jobs] == [job_id]


async def test_a_run_that_was_overtaken_ends_nothing(pool: Pool, jobs: Jobs, doomed: Doomed) -> None:
    (job_id,) = await jobs.add()
    old = await doomed.crash(job_id)
    await give_back(pool, old)
    await doomed.claim(job_id)
    before = await jobs.row(job_id)
    assert await finish(pool, old) == {}
    assert await jobs.row(job_id) == before
    (call,) = await jobs.calls(job_id)
    assert (call["state"], call["cost_nano"]) == ("answered", COST)
    assert await jobs.spend() == await jobs.ledger()


async def test_a_run_that_was_overtaken_may_make_no_call(pool: Pool, jobs: Jobs, doomed: Doomed) -> None:
    (job_id,) = await jobs.add()
    old = await doomed.claim(job_id)
    await give_back(pool, old)
    with pytest.raises(AssertionError, match="set"):
        await doomed.open_call(old)
    assert await jobs.calls(job_id) == []


async def test_a_finish_that_is_sent_twice_books_once(pool: Pool, jobs: Jobs, doomed: Doomed) -> None:
    (job_id,) = await jobs.add()
    job = await doomed.crash(job_id)
    assert await finish(pool, job) == {(job_id, job.run): JobState.SUCCEEDED}
    assert await finish(pool, job) == {}
    assert (await jobs.spend())["global", "total"] == (COST, 0)
    assert len(await jobs.attempts(job_id)) == 1


async def test_the_heartbeat_renews_rows_and_queue(
    pool: Pool, redis: Redis, jobs: Jobs, scripted: ScriptedProvider, clock: Clock
) -> None:
    scripted.open.clear()
    (job_id,) = await jobs.add()
    async with running_worker(lease_seconds=3):
        await scripted.arrived(1)
        # Most of the lease passes at once; then it is whole again.
        await clock.advance(timedelta(seconds=2.5))
        ends = await pool.fetchval("SELECT headrace.now() + interval '2 seconds'")
        await jobs.until(job_id, lambda row: row["lease_until"] > ends)
        left = await eventually(
            lambda: lease_in_redis(redis, job_id), lambda left: left is not None and left > 1
        )
        assert left is not None
        # What is missing in Redis under a live row is taken again.
        await redis.evaluate(script("return redis.call('FLUSHDB')"))
        await eventually(lambda: lease_in_redis(redis, job_id), lambda left: left is not None)
        scripted.open.set()
        (ending,) = await jobs.ended([job_id])
    assert (ending.job.state, ending.job.run) == (JobState.SUCCEEDED, 1)
    assert await lease_in_redis(redis, job_id) is None


async def test_a_lost_lease_cancels_the_call_and_ends_nothing(
    pool: Pool, jobs: Jobs, scripted: ScriptedProvider
) -> None:
    scripted.open.clear()
    (job_id,) = await jobs.add()
    async with running_worker():
        await scripted.arrived(1)
        # Somebody else has it now.
        await pool.execute(
            "UPDATE headrace.jobs SET run = run + 1, worker = 'other',"
            " lease_until = headrace.now() + interval '1 hour' WHERE id = $1",
            job_id,
        )
        call = await eventually(
            lambda: jobs.calls(job_id), lambda calls: [call["state"] for call in calls] == ["suspense"]
        )
    assert (call[0]["suspense_nano"], call[0]["error_class"]) == (call[0]["held_nano"], "cancelled")
    row = await jobs.row(job_id)
    assert (row["state"], row["run"], row["worker"]) == ("running", 2, "other")
    assert await jobs.attempts(job_id) == []
    assert await jobs.spend() == await jobs.ledger()


Lost: TypeAlias = asyncio.Queue[tuple[JobId, WaitReason | ErrorClass]]


async def heartbeat_of(doomed: Doomed, running: dict[JobId, ClaimedJob], lost: Lost) -> Heartbeat:
    return Heartbeat(
        doomed.pool,
        doomed.jobs.dispatch,
        DEAD,
        shortest_lease=lambda: min(job.lease for job in running.values()),
        running=running,
        interrupt=lambda job_id, reason: lost.put_nowait((job_id, reason)),
        introduce=lambda: ("host", 1, ("default",)),
        follow=(await Configured.load(doomed.pool)).follow,
        leases=Leases(),
    )


async def test_a_run_that_ends_during_a_heartbeat_is_neither_renewed_nor_lost(
    doomed: Doomed, jobs: Jobs, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = [await doomed.claim(job_id) for job_id in await jobs.add(3)]
    running, lost = {job.id: job for job in (first, second, third)}, Lost()
    finisher = Finisher(doomed.pool, jobs.dispatch, doomed.budgets, DEAD, running)
    heartbeat = claims.heartbeat

    async def end(job: ClaimedJob, outcome: Outcome) -> None:
        end = RunEnd(job.id, job.run, outcome, 0)
        assert await finisher.submit(Finish(Entry(QUEUE, job.id), None, None, None, end))
        await finisher.drain()

    async def in_between(pool: Pool, held: Sequence[ClaimedJob]) -> Sequence[claims.Kept]:
        await end(first, Snoozed(timedelta(hours=1), WaitReason.RETRY))
        kept = await heartbeat(pool, held)
        await end(second, Snoozed(timedelta(hours=1), WaitReason.RETRY))
        return kept

    monkeypatch.setattr(claims, "heartbeat", in_between)
    await (await heartbeat_of(doomed, running, lost)).beat()
    assert list(running) == [third.id]
    assert lost.empty()
    due = [await lease_in_redis(redis, job.id) or 0 for job in (first, second, third)]
    assert min(due[:2]) > LEASE.total_seconds() + 1
    assert LEASE.total_seconds() / 2 < due[2] <= LEASE.total_seconds() + 1


async def test_leases_that_cannot_be_renewed_in_time_are_lost(pool: Pool, jobs: Jobs, doomed: Doomed) -> None:
    (job_id,) = await jobs.add()
    job = await doomed.claim(job_id)
    lost = Lost()
    heartbeat = await heartbeat_of(doomed, {job_id: replace(job, lease=timedelta(seconds=1))}, lost)
    # The store hangs: it neither answers nor refuses.
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("LOCK TABLE headrace.workers IN ACCESS EXCLUSIVE MODE")
        beating = asyncio.create_task(heartbeat.run())
        async with asyncio.timeout(10):
            assert await lost.get() == (job_id, WaitReason.LOST_LEASE)
    beating.cancel()
    await asyncio.gather(beating, return_exceptions=True)


async def test_the_reaper_takes_back_what_a_dead_worker_held(doomed: Doomed, clock: Clock) -> None:
    redis, jobs, reaper = doomed.redis, doomed.jobs, doomed.reaper
    (job_id,) = await jobs.add()
    job = await doomed.crash(job_id)
    await reaper.turn()
    assert (await jobs.row(job_id))["state"] == "running"
    assert (await doomed.budgets.view())[0].held == AMOUNT
    await clock.advance(LEASE + timedelta(seconds=1))
    await reaper.turn()
    row = await jobs.row(job_id)
    assert (row["state"], row["crashes"], row["attempts"]) == ("queued", 1, 0)
    assert row["waiting_for"] == WaitReason.LOST_LEASE
    (call,) = await jobs.calls(job_id)
    assert (call["state"], call["suspense_nano"]) == ("suspense", AMOUNT)
    (view,) = await doomed.budgets.view()
    assert (view.held, view.state.suspense, view.state.settled) == (0, AMOUNT, 0)
    assert await spent(redis) == {"held": 0, "suspense": AMOUNT}
    left = await lease_in_redis(redis, job_id)
    assert left is not None
    assert left <= 1
    assert (await doomed.claim(job_id)).run == job.run + 1
    assert await jobs.spend() == await jobs.ledger()


async def test_attempts_of_a_run_that_died_are_not_made_again(doomed: Doomed, clock: Clock) -> None:
    """They failed in its slot: the row would have been told of them at the run's end."""
    jobs, pool = doomed.jobs, doomed.pool
    (job_id,) = await jobs.add(max_attempts=3)
    job = await doomed.crash(job_id)
    failed = AttemptRecord(job.id, job.run, 1, FIRST, "retried", ErrorClass.TRANSIENT, "it said 500")
    await runs.finish(pool, DEAD, 1, conclusions=[answered(job)], attempts=[failed], ends=[])
    await clock.advance(LEASE + timedelta(seconds=1))
    await doomed.reaper.turn()
    assert (await doomed.claim(job_id)).attempts == 1


async def spent(redis: Redis) -> dict[str, int]:
    counters = await redis.hash(keys.SPENT)
    return {part: int(counters.get(f"global|total|{part}", 0)) for part in ("held", "suspense")}


async def test_an_answer_that_comes_after_the_reaper_is_booked_and_not_paid_for_again(
    doomed: Doomed, clock: Clock, scripted: ScriptedProvider
) -> None:
    pool, jobs, reaper = doomed.pool, doomed.jobs, doomed.reaper
    (job_id,) = await jobs.add()
    late = await doomed.crash(job_id)
    await clock.advance(LEASE + timedelta(seconds=1))
    await reaper.turn()
    assert await finish(pool, late) == {}
    (call,) = await jobs.calls(job_id)
    assert (call["state"], call["cost_nano"], call["suspense_nano"]) == ("answered", COST, 0)
    assert (await jobs.spend())["global", "total"] == (COST, 0)
    assert (await jobs.row(job_id))["state"] == "queued"
    async with running_worker():
        (ending,) = await jobs.ended([job_id])
    assert (ending.job.state, ending.job.run) == (JobState.SUCCEEDED, 2)
    assert ending.answer is not None
    assert (ending.answer.run, ending.answer.body) == (1, b"{}")
    assert scripted.requests == []


async def test_a_frozen_worker_that_wakes_up_corrects_the_counters(
    doomed: Doomed, scripted: ScriptedProvider
) -> None:
    pool, redis, jobs = doomed.pool, doomed.redis, doomed.jobs
    scripted.open.clear()
    (job_id,) = await jobs.add()
    async with running_worker(lease_seconds=60):
        await scripted.arrived(1)
        # At once, so that nobody claims it before it has to wait.
        async with pool.acquire() as connection, connection.transaction():
            await Clock(connection, redis).advance(timedelta(seconds=61))
            await lost.reap(connection)
            await connection.execute(
                "UPDATE headrace.jobs SET run_at = run_at + interval '1 hour' WHERE id = $1", job_id
            )
        held = (await jobs.calls(job_id))[0]["held_nano"]
        await doomed.budgets.rebuild()
        assert await spent(redis) == {"held": 0, "suspense": held}
        scripted.open.set()
        await eventually(lambda: spent(redis), lambda found: found == {"held": 0, "suspense": 0})
        # It waited for an hour: its answer does not.
        (ending,) = await jobs.ended([job_id])
    (call,) = await jobs.calls(job_id)
    assert (call["state"], call["suspense_nano"]) == ("answered", 0)
    assert (ending.job.state, ending.job.run) == ("succeeded", 2)
    assert await jobs.spend() == await jobs.ledger()


async def test_after_two_crashes_only_a_process_of_its_own_gets_a_job(doomed: Doomed, clock: Clock) -> None:
    jobs, reaper = doomed.jobs, doomed.reaper
    (job_id,) = await jobs.add()
    for _ in range(2):
        await doomed.crash(job_id)
        await clock.advance(LEASE + timedelta(seconds=1))
        await reaper.turn()
    assert (await claims.claim_jobs(doomed.pool, [job_id], DEAD, LEASE)).jobs == []
    (found,) = await claims.look_up(doomed.pool, [job_id])
    assert found.standing is claims.Standing.SUSPECT
    job = await doomed.claim(job_id, alone=True)
    assert await finish(doomed.pool, job)


async def test_a_crash_alone_that_was_seen_quarantines_and_calls_back(doomed: Doomed, clock: Clock) -> None:
    redis, jobs, reaper = doomed.redis, doomed.jobs, doomed.reaper
    suspects = Suspects(doomed.pool, Dispatch(doomed.redis), doomed.budgets, load_settings(), DEAD)
    (job_id,) = await jobs.add(webhook="https://example.com/hook")
    for _ in range(2):
        await doomed.crash(job_id)
        await clock.advance(LEASE + timedelta(seconds=1))
        await reaper.turn()
    await doomed.crash(job_id, alone=True)
    assert await suspects.condemn(job_id, DEAD, "signal 9")
    row = await jobs.row(job_id)
    assert (row["state"], row["error_class"], row["crashes"]) == ("failed", "quarantined", 3)
    assert [call["state"] for call in await jobs.calls(job_id)] == ["suspense"] * 3
    (delivery,) = await jobs.deliveries(job_id)
    assert delivery["event_type"] == "job.failed"
    assert await lease_in_redis(redis, job_id) is None
    assert (await doomed.budgets.view())[0].held == 0
    assert await jobs.spend() == await jobs.ledger()


async def test_a_row_that_is_written_while_it_is_taken_away_is_taken_as_it_is_then(
    doomed: Doomed, pool: Pool
) -> None:
    (job_id,) = await doomed.jobs.add()
    job = await doomed.crash(job_id, alone=True)
    async with pool.acquire() as connection, connection.transaction():
        await claims.heartbeat(connection, [job])
        taking = asyncio.create_task(lost.quarantine(pool, job_id, DEAD, "exit code 9"))
        await eventually(lambda: waiting(pool), lambda count: count == 1)
    taken = await taking
    assert taken is not None
    assert (taken.id, taken.state) == (job_id, JobState.FAILED)
    assert [call["state"] for call in await doomed.jobs.calls(job_id)] == ["suspense"]


async def test_a_death_that_nobody_saw_condemns_only_after_the_third_time_alone(
    doomed: Doomed, clock: Clock
) -> None:
    jobs, reaper = doomed.jobs, doomed.reaper
    (job_id,) = await jobs.add()
    states: list[str] = []
    for crash in range(5):
        await doomed.crash(job_id, alone=crash >= 2)
        await clock.advance(LEASE + timedelta(seconds=1))
        await reaper.turn()
        states.append((await jobs.row(job_id))["state"])
    assert states == ["queued", "queued", "queued", "queued", "failed"]


async def test_leases_are_spared_right_after_the_start_of_the_store(doomed: Doomed, pool: Pool) -> None:
    (job_id,) = await doomed.jobs.add()
    await doomed.crash(job_id)
    await pool.execute("UPDATE headrace.jobs SET lease_until = headrace.now() - interval '1 second'")
    assert await lost.reap(pool, spare=timedelta(days=365)) == []
    (reaped,) = await lost.reap(pool)
    assert (reaped.id, reaped.state) == (job_id, "queued")


async def test_an_intent_that_arrives_after_its_run_is_not_held_for_ever(
    doomed: Doomed, clock: Clock
) -> None:
    pool, redis, jobs, reaper = doomed.pool, doomed.redis, doomed.jobs, doomed.reaper
    (job_id,) = await jobs.add()
    job = await doomed.crash(job_id)
    await give_back(pool, job)
    await reaper.turn()
    assert [call["state"] for call in await jobs.calls(job_id)] == ["open"]
    await clock.advance(timedelta(seconds=61))
    await reaper.turn()
    assert [call["state"] for call in await jobs.calls(job_id)] == ["suspense"]
    assert await spent(redis) == {"held": 0, "suspense": AMOUNT}
    assert await jobs.spend() == await jobs.ledger()


async def claim_out_of_time(doomed: Doomed, clock: Clock) -> ClaimedJob:
    """Claim a job that may cost one call and a bit, and outlive its lease."""
    (job_id,) = await doomed.jobs.add()
    await doomed.pool.execute("UPDATE headrace.jobs SET max_cost_nano = $1", AMOUNT + 1)
    job = await doomed.claim(job_id)
    await clock.advance(LEASE + timedelta(seconds=1))
    return job


async def test_a_row_is_not_taken_from_an_intent_that_its_next_run_could_not_see(
    doomed: Doomed, clock: Clock
) -> None:
    job = await claim_out_of_time(doomed, clock)
    epoch, intent = await doomed.intend(job)
    async with doomed.pool.acquire() as connection, connection.transaction():
        assert await runs.open_calls(connection, epoch, [intent]) == {(job.id, FIRST)}
        assert await lost.reap(doomed.pool) == []
    assert [reaped.id for reaped in await lost.reap(doomed.pool)] == [job.id]
    again = await doomed.claim(job.id)
    assert again.allowance == Allowance(NanoUSD(AMOUNT + 1), spent=AMOUNT)


async def test_an_intent_waits_for_who_takes_its_row_and_comes_too_late(doomed: Doomed, clock: Clock) -> None:
    job = await claim_out_of_time(doomed, clock)
    epoch, intent = await doomed.intend(job)
    async with doomed.pool.acquire() as connection, connection.transaction():
        assert [reaped.id for reaped in await lost.reap(connection)] == [job.id]
        writing = asyncio.create_task(runs.open_calls(doomed.pool, epoch, [intent]))
        await eventually(lambda: waiting(doomed.pool), lambda count: count == 1)
    assert await writing == set()
    again = await doomed.claim(job.id)
    assert again.allowance == Allowance(NanoUSD(AMOUNT + 1))


async def test_holds_without_a_call_are_given_back(
    redis: Redis, doomed: Doomed, reaper: Reaper, clock: Clock
) -> None:
    scopes = (GLOBAL, f"tenant:{TENANT}")
    await doomed.budgets.hold([HoldRequest(hold_id(new_job_id(), Run(1), FIRST), AMOUNT, scopes)])
    assert (await spent(redis))["held"] == AMOUNT
    await clock.advance(timedelta(seconds=61))
    await reaper.turn()
    assert await spent(redis) == {"held": 0, "suspense": 0}


async def test_counters_that_are_an_epoch_behind_stop_nobody(
    pool: Pool, jobs: Jobs, scripted: ScriptedProvider
) -> None:
    (first,) = await jobs.add()
    async with running_worker():
        await jobs.ended([first])
        # Somebody raised it and died before he could put the counters in place.
        await pool.execute("SELECT headrace.raise_epoch()")
        (second,) = await jobs.add()
        (ending,) = await jobs.ended([second])
    assert ending.job.state is JobState.SUCCEEDED


async def test_the_queue_is_put_right_where_the_rows_say_something_else(
    pool: Pool, redis: Redis, dispatch: Dispatch, jobs: Jobs, scripted: ScriptedProvider
) -> None:
    ended, absent = (await jobs.add(push=False))[0], new_job_id()
    future, foreign = (
        (await jobs.add(push=False, delay=timedelta(hours=1)))[0],
        (await jobs.add(push=False))[0],
    )
    await pool.execute(
        "UPDATE headrace.jobs SET state = 'cancelled', ended_at = headrace.now() WHERE id = $1", ended
    )
    await claims.claim_jobs(pool, [foreign], WorkerId("other"), timedelta(hours=2))
    everything = (ended, absent, future, foreign)
    await dispatch.push([(Entry(QUEUE, job_id), timedelta(0)) for job_id in everything])
    key = keys.QUEUE + keys.queue_name(QUEUE)
    await redis.evaluate(script("return redis.call('ZADD', ARGV[1], 0, 'no id')"), (), [key])

    async def leases() -> list[float | None]:
        return [await lease_in_redis(redis, job_id) for job_id in everything]

    def right(found: list[float | None]) -> bool:
        return found[:2] == [None, None] and all(left is not None and left > 3000 for left in found[2:])

    async with running_worker():
        await eventually(leases, right)
        (last,) = await jobs.add()
        await jobs.ended([last])
    assert (await jobs.row(foreign))["worker"] == "other"
    assert (await jobs.row(future))["run"] == 0
    members = await redis.evaluate(script("return redis.call('ZCARD', ARGV[1])"), (), [key])
    assert members == 2


async def test_a_deadlock_costs_nobody_his_worker(pool: Pool, jobs: Jobs, scripted: ScriptedProvider) -> None:
    """A statement of the worker's that the server picks as a victim is made again."""
    scripted.open.clear()
    ids = sorted(await jobs.add(2, tenant=Tenant("one")))
    async with running_worker():
        await scripted.arrived(2)
        async with pool.acquire() as connection, connection.transaction():
            await connection.execute("SET LOCAL deadlock_timeout = '1h'")
            lock = "SELECT 1 FROM headrace.jobs WHERE id = $1 FOR UPDATE"
            await connection.execute(lock, ids[1])
            # The heartbeat has the first and waits for the second ...
            await eventually(lambda: waiting(pool), lambda found: found > 0)
            # ... which now waits for the first: one of them has to give way.
            await connection.execute(lock, ids[0])
        scripted.open.set()
        endings = await jobs.ended(ids)
    assert {ending.job.state for ending in endings} == {JobState.SUCCEEDED}
    assert {ending.job.crashes for ending in endings} == {0}


async def waiting(pool: Pool) -> int:
    return int(
        await pool.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            " AND datname = current_database()"
        )
    )
