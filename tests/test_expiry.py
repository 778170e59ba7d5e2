"""A job that ran out of time ends as expired, whatever it was doing, and says so; others are left alone."""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import cast

import pytest
from command_line import BODY, Command

from headrace_producer import Headrace, JobHandle, JobRequest, JobState
from headrace_shared.dispatch import keys
from headrace_shared.dispatch.connection import Redis
from headrace_shared.dispatch.dispatch import Dispatch
from headrace_shared.errors import InvalidRequest, JobExpired
from headrace_shared.ids import JobId, Lane, RouteName, Tenant, WorkerId
from headrace_shared.job import ClaimedJob, Queue
from headrace_shared.outcome import ErrorClass, Failure, Outcome, Retry, Snoozed, WaitReason
from headrace_shared.store import claims, lost, runs
from headrace_shared.store.claims import Standing
from headrace_shared.store.pool import Pool
from headrace_shared.store.runs import RunEnd
from headrace_shared.testing.clock import Clock, script
from headrace_shared.testing.jobs import MODEL, Jobs, eventually
from headrace_shared.testing.scripted_provider import ScriptedProvider
from headrace_workers.testing import running_worker

pytestmark = pytest.mark.conformance

CHAT = "/v1/chat/completions"
HOOK = "https://example.com/hook"
HOUR, MINUTE, SECOND = timedelta(hours=1), timedelta(minutes=1), timedelta(seconds=1)
LEASE = timedelta(seconds=30)
WORKER = WorkerId("a-test")
QUEUE = Queue(Lane("default"), RouteName(MODEL), Tenant("default"))


@pytest.fixture
def jobs(pool: Pool, dispatch: Dispatch) -> Jobs:
    return Jobs(pool, dispatch)


async def claim(pool: Pool, job_id: JobId) -> ClaimedJob:
    [job] = (await claims.claim_jobs(pool, [job_id], WORKER, LEASE)).jobs
    return job


async def put_back(pool: Pool, job: ClaimedJob, outcome: Outcome, attempts: int = 0) -> None:
    end = RunEnd(job.id, job.run, outcome, attempts)
    await runs.finish(pool, WORKER, 1, conclusions=[], attempts=[], ends=[end])


async def expired(jobs: Jobs, job: JobHandle) -> str:
    """Make sure that a job ended as expired, once and for everybody, and return why."""
    with pytest.raises(JobExpired) as caught:
        await job.result(timeout=timedelta(seconds=30))
    assert (await job.get()).state is JobState.EXPIRED
    assert [row["event_type"] for row in await jobs.deliveries(job.id)] == ["job.expired"]
    assert caught.value.error_class == ErrorClass.EXPIRED
    return caught.value.error


async def left(pool: Pool) -> set[JobId]:
    """Let the store look for what has expired; return what it found."""
    return {one.id for one in await lost.expire(pool)}


# Queued.


async def test_a_job_that_nobody_starts_within_its_time_to_live_expires(
    headrace: Headrace, jobs: Jobs, clock: Clock
) -> None:
    job = await headrace.enqueue(CHAT, BODY, ttl=HOUR, webhook=HOOK)
    await clock.advance(HOUR - MINUTE)
    assert await left(jobs.pool) == set()
    await clock.advance(2 * MINUTE)
    assert await left(jobs.pool) == {job.id}
    assert await expired(jobs, job) == "it was not started within its time to live"
    assert await left(jobs.pool) == set()


async def test_a_job_that_was_started_has_met_its_time_to_live(
    headrace: Headrace, jobs: Jobs, clock: Clock
) -> None:
    job = await headrace.enqueue(CHAT, BODY, ttl=HOUR)
    first = await claim(jobs.pool, job.id)
    assert first.time_left is None
    await put_back(jobs.pool, first, Snoozed(timedelta(0), WaitReason.SHUTDOWN))
    await clock.advance(2 * HOUR)
    assert await left(jobs.pool) == set()
    assert (await claim(jobs.pool, job.id)).run == 2


async def test_a_time_to_live_begins_when_the_job_is_due(
    headrace: Headrace, jobs: Jobs, clock: Clock
) -> None:
    delayed = await headrace.enqueue(CHAT, BODY, delay=HOUR, ttl=MINUTE)
    planned = await headrace.enqueue(CHAT, BODY, run_at=datetime.now(UTC) + HOUR, ttl=MINUTE)
    past = await headrace.enqueue(CHAT, BODY, run_at=datetime.now(UTC) - HOUR, ttl=HOUR)
    await clock.advance(HOUR - SECOND)
    assert await left(jobs.pool) == set()
    await clock.advance(50 * SECOND)
    assert await left(jobs.pool) == {past.id}
    await clock.advance(MINUTE)
    assert await left(jobs.pool) == {delayed.id, planned.id}


async def test_a_job_whose_deadline_passes_while_it_is_queued_expires(
    headrace: Headrace, jobs: Jobs, clock: Clock
) -> None:
    job = await headrace.enqueue(CHAT, BODY, deadline=datetime.now(UTC) + HOUR, webhook=HOOK)
    await clock.advance(HOUR - MINUTE)
    assert await left(jobs.pool) == set()
    await clock.advance(2 * MINUTE)
    assert await left(jobs.pool) == {job.id}
    assert await expired(jobs, job) == "its deadline passed before it was started"


async def test_nobody_starts_a_job_that_has_run_out_of_time(
    headrace: Headrace, jobs: Jobs, clock: Clock
) -> None:
    late = await headrace.enqueue(CHAT, BODY, ttl=MINUTE)
    over = await headrace.enqueue(
        CHAT, BODY, deadline=datetime.now(UTC) - MINUTE, idempotency_key="said again"
    )
    await clock.advance(2 * MINUTE)
    assert (await claims.claim_jobs(jobs.pool, [late.id, over.id], WORKER, LEASE)).jobs == []
    found = await claims.look_up(jobs.pool, [late.id, over.id])
    assert {one.standing for one in found} == {Standing.OVERDUE}


# Started.


async def test_a_job_that_waits_for_a_retry_when_its_timeout_is_over_expires(
    headrace: Headrace, jobs: Jobs, clock: Clock
) -> None:
    job = await headrace.enqueue(CHAT, BODY, timeout=10 * MINUTE, webhook=HOOK)
    await clock.advance(HOUR)
    first = await claim(jobs.pool, job.id)
    assert first.time_left is not None
    assert 9 * MINUTE < first.time_left <= 10 * MINUTE
    await put_back(jobs.pool, first, Retry(2 * HOUR, Failure(ErrorClass.TRANSIENT, "Once.")), attempts=1)
    await clock.advance(9 * MINUTE)
    assert await left(jobs.pool) == set()
    await clock.advance(2 * MINUTE)
    assert await left(jobs.pool) == {job.id}
    assert await expired(jobs, job) == "its deadline or timeout passed while it waited"


async def test_the_earlier_of_deadline_and_timeout_counts(headrace: Headrace, jobs: Jobs) -> None:
    soon = datetime.now(UTC) + MINUTE
    job = await headrace.enqueue(CHAT, BODY, deadline=soon, timeout=HOUR)
    claimed = await claim(jobs.pool, job.id)
    assert claimed.time_left is not None
    assert claimed.time_left <= MINUTE
    assert (await job.get()).end_by == soon


async def test_a_job_that_is_redelivered_keeps_its_end(headrace: Headrace, jobs: Jobs, clock: Clock) -> None:
    job = await headrace.enqueue(CHAT, BODY, timeout=10 * MINUTE, webhook=HOOK)
    await claim(jobs.pool, job.id)
    end = (await job.get()).end_by
    await clock.advance(2 * MINUTE)
    assert [one.state for one in await lost.reap(jobs.pool)] == [JobState.QUEUED]
    again = await claim(jobs.pool, job.id)
    assert (await job.get()).end_by == end
    assert again.time_left is not None
    assert 7 * MINUTE < again.time_left <= 8 * MINUTE
    await clock.advance(9 * MINUTE)
    assert [one.state for one in await lost.reap(jobs.pool)] == [JobState.EXPIRED]
    assert await expired(jobs, job) == "its deadline or timeout passed while it ran"


async def test_a_call_that_is_under_way_at_the_deadline_is_cut_off_and_stands_in_suspense(
    headrace: Headrace, jobs: Jobs, scripted: ScriptedProvider
) -> None:
    scripted.open.clear()
    async with running_worker():
        other = await headrace.enqueue(CHAT, BODY)
        await scripted.arrived(1)
        job = await headrace.enqueue(CHAT, BODY, deadline=datetime.now(UTC) + SECOND, webhook=HOOK)
        await scripted.arrived(2)
        assert await expired(jobs, job) == "its deadline or timeout passed while it ran"
        scripted.open.set()
        await other.result(timeout=LEASE)
    [call] = await jobs.calls(job.id)
    assert (call["state"], call["suspense_nano"]) == ("suspense", call["held_nano"])
    assert call["held_nano"] > 0
    assert await jobs.attempts(job.id) == []
    assert await jobs.spend() == await jobs.ledger()


async def test_the_reaper_ends_what_expired_while_it_was_queued(
    headrace: Headrace, jobs: Jobs, scripted: ScriptedProvider, clock: Clock
) -> None:
    job = await headrace.enqueue(CHAT, BODY, ttl=MINUTE, webhook=HOOK)
    await clock.advance(2 * MINUTE)
    async with running_worker():
        await expired(jobs, job)
    assert scripted.requests == []


async def test_a_job_without_any_limit_waits_as_long_as_it_must(
    headrace: Headrace, jobs: Jobs, clock: Clock
) -> None:
    job = await headrace.enqueue(CHAT, BODY)
    await clock.advance(timedelta(days=300))
    assert await left(jobs.pool) == set()
    claimed = await claim(jobs.pool, job.id)
    assert claimed.time_left is None
    row = await jobs.row(job.id)
    assert (row["start_by"], row["end_by"], row["timeout"], row["needs"]) == (None, None, None, [])


# What comes in.


async def test_a_job_that_is_planned_is_announced_for_its_time(headrace: Headrace, redis: Redis) -> None:
    when = datetime.now(UTC) + HOUR
    planned = await headrace.enqueue(CHAT, BODY, run_at=when)
    await headrace.enqueue(CHAT, BODY, run_at=datetime.now(UTC) - HOUR)
    assert (await planned.get()).run_at == when
    key = keys.QUEUE + keys.queue_name(QUEUE)
    score = script("return redis.call('ZSCORE', ARGV[1], ARGV[2])")
    answer = await redis.evaluate(score, (), [key, str(planned.id)])
    assert isinstance(answer, bytes)
    assert abs(float(answer) / 1000 - when.timestamp()) < 5
    assert await Dispatch(redis).due([QUEUE]) == [1]


def untyped(**options: object) -> JobRequest:
    """A request as somebody without a type checker may make it."""
    return cast("Callable[..., JobRequest]", JobRequest)(CHAT, BODY, **options)


LATER = datetime.now(UTC) + HOUR
BAD: list[tuple[Mapping[str, object], str]] = [
    ({"run_at": LATER, "delay": HOUR}, "run_at: says the same as delay"),
    ({"run_at": LATER.replace(tzinfo=None)}, "run_at: must be a datetime with a time zone"),
    ({"deadline": LATER.replace(tzinfo=None)}, "deadline: must be a datetime with a time zone"),
    ({"deadline": HOUR}, "deadline: must be a datetime with a time zone"),
    ({"run_at": LATER, "deadline": LATER}, "deadline: must be later than run_at"),
    ({"run_at": LATER + timedelta(days=366)}, "run_at: must be within 365 days"),
    ({"deadline": LATER + timedelta(days=366)}, "deadline: must be within 365 days"),
    ({"deadline": datetime(2020, 5, 1, tzinfo=UTC)}, "deadline: 2020-05-01 00:00:00 UTC has passed, it is "),
    ({"ttl": timedelta(0)}, "ttl: must be a timedelta longer than 0 and up to 365 days"),
    ({"ttl": 60}, "ttl: must be a timedelta"),
    ({"timeout": -SECOND}, "timeout: must be a timedelta longer than 0"),
    ({"timeout": timedelta(days=366)}, "timeout: must be a timedelta longer than 0 and up to 365 days"),
    ({"delay": -SECOND}, "delay: must be a timedelta from 0 to 365 days"),
]


@pytest.mark.parametrize(("options", "sentence"), BAD, ids=[sentence for _, sentence in BAD])
async def test_a_time_that_makes_no_sense_is_refused(
    headrace: Headrace, pool: Pool, options: Mapping[str, object], sentence: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await headrace.enqueue_many([untyped(**options)])
    assert caught.value.message.startswith(sentence)
    assert await pool.fetchval("SELECT count(*) FROM headrace.jobs") == 0


async def test_every_job_of_a_batch_has_the_times_that_were_asked_for(
    environment: None, pool: Pool, command: Command, clock: Clock
) -> None:
    submitted = await command.submit(3, "--ttl", "2h", "--timeout", "10m", "--deadline", f"{LATER:%FT%TZ}")
    assert submitted.code == 0
    rows = await pool.fetch("SELECT * FROM headrace.jobs")
    assert {row["start_by"] - row["run_at"] for row in rows} == {2 * HOUR}
    assert {row["timeout"] for row in rows} == {10 * MINUTE}
    assert {row["end_by"] for row in rows} == {LATER.replace(microsecond=0)}
    shown = await command("status", rows[0]["id"])
    assert f"must be ended by {LATER:%Y-%m-%d %H:%M:%S}" in shown.out
    assert "may take 10 min" in shown.out
    await clock.advance(3 * HOUR)
    assert len(await lost.expire(pool)) == 3


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("--ttl", "soon", "--ttl: must be a duration"),
        ("--ttl", "0s", "ttl: must be a timedelta longer than 0"),
        ("--deadline", "2026-05-01T12:00", "--deadline: '2026-05-01T12:00' is not a moment with a time zone"),
        ("--deadline", "2020-05-01T12:00Z", "deadline: 2020-05-01 12:00:00 UTC has passed, it is "),
        ("--timeout", "-5m", "--timeout: must be a duration"),
    ],
)
async def test_a_batch_with_a_time_that_makes_no_sense_is_refused(
    pool: Pool, command: Command, *, environment: None, option: str, value: str, sentence: str
) -> None:
    for asked in ((), ("--dry-run",)):
        refused = await command.submit(1, f"{option}={value}", *asked)
        assert refused.code == 2
        assert refused.err.startswith(f"headrace: {sentence}")
    assert await pool.fetchval("SELECT count(*) FROM headrace.batches") == 0


async def test_a_batch_whose_deadline_has_passed_is_still_shown(environment: None, command: Command) -> None:
    soon = datetime.now(UTC) + 2 * SECOND
    option = f"--deadline={soon.isoformat()}"
    first = await command.submit(1, option)
    await eventually(_now, lambda now: now > soon)
    second = await command.submit(1, option)
    assert (second.code, second.out) == (0, first.out)


async def _now() -> datetime:
    return datetime.now(UTC)
