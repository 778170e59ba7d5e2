"""What ended without a result is grouped, retried once as a new job, and keeps its own ending."""

import asyncio
import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import asyncpg
import pytest
from command_line import BODY, Command

from headrace_producer import Headrace
from headrace_shared.dispatch.dispatch import Dispatch
from headrace_shared.errors import (
    AlreadyRetried,
    IdempotencyConflict,
    InvalidRequest,
    JobCancelled,
    JobFailed,
    JobNotFound,
    NotRetriable,
)
from headrace_shared.ids import JobId, WorkerId
from headrace_shared.job import NEEDS_EXPIRY
from headrace_shared.outcome import ErrorClass, Failed, Failure
from headrace_shared.store import claims, dead_letters, lost, runs
from headrace_shared.store.dead_letters import Selection
from headrace_shared.store.pool import Pool
from headrace_shared.store.runs import RunEnd
from headrace_shared.testing.clock import Clock
from headrace_shared.testing.endings import COST, End, Endings
from headrace_shared.testing.jobs import Jobs, eventually
from headrace_shared.testing.simulated_provider import SimulatedProvider
from headrace_workers.testing import running_worker

pytestmark = pytest.mark.conformance

pytestmark = pytest.mark.conformance

CHAT = "/v1/chat/completions"
OTHER_BODY = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Shorter."}]}
HOOK = "https://example.com/hook"
HOUR, MINUTE = timedelta(hours=1), timedelta(minutes=1)
WORKER = WorkerId("a-test")
KEPT = (
    *("tenant", "lane", "route", "endpoint", "body", "max_attempts", "webhook", "metadata", "traceparent"),
    *("batch_id", "line", "custom_id", "timeout", "needs"),
)
ENDING = ("state", "run", "attempts", "error_class", "error", "ended_at", "started_at", "result_run")
NO = End.refused(400, b'{"error": {"message": "no"}}')


@pytest.fixture
def jobs(pool: Pool, dispatch: Dispatch) -> Jobs:
    return Jobs(pool, dispatch)


async def fail(pool: Pool, *ids: JobId, end: End = NO) -> None:
    await Endings(pool).end([(job_id, end) for job_id in ids])


async def fail_with(pool: Pool, job_id: JobId, error_class: ErrorClass, message: str) -> None:
    [job] = (await claims.claim_jobs(pool, [job_id], WORKER, HOUR)).jobs
    end = RunEnd(job.id, job.run, Failed(Failure(error_class, message)), 1)
    await runs.finish(pool, WORKER, 1, conclusions=[], attempts=[], ends=[end])


async def enqueue_many(headrace: Headrace, count: int) -> list[JobId]:
    return [(await headrace.enqueue(CHAT, BODY)).id for _ in range(count)]


def only(row: asyncpg.Record, names: Sequence[str]) -> dict[str, object]:
    return {name: row[name] for name in names}


# One job.


async def test_a_retry_is_a_new_job_and_the_old_one_keeps_its_ending(
    headrace: Headrace, jobs: Jobs, provider: SimulatedProvider
) -> None:
    old = await headrace.enqueue(CHAT, BODY, webhook=HOOK, metadata={"a": "b"}, max_attempts=3, timeout=HOUR)
    await fail(jobs.pool, old.id)
    before = await jobs.row(old.id)
    new = await old.retry()
    row, after = await jobs.row(new.id), await jobs.row(old.id)
    assert only(row, KEPT) == only(before, KEPT)
    assert (row["state"], row["run"], row["attempts"], row["crashes"]) == ("queued", 0, 0, 0)
    assert (row["started_at"], row["end_by"]) == (None, None)
    assert (row["replaces"], after["replaced_by"]) == (old.id, new.id)
    assert only(after, ENDING) == only(before, ENDING)
    async with running_worker():
        assert (await new.result(timeout=MINUTE)).status == 200
    with pytest.raises(JobFailed) as caught:
        await old.result()
    assert caught.value.error_class == ErrorClass.BAD_REQUEST
    assert [row["event_type"] for row in await jobs.deliveries(old.id)] == ["job.failed"]
    assert [row["event_type"] for row in await jobs.deliveries(new.id)] == ["job.succeeded"]
    assert await jobs.spend() == await jobs.ledger()


async def test_what_has_not_ended_badly_is_not_retried(headrace: Headrace, pool: Pool) -> None:
    job = await headrace.enqueue(CHAT, BODY)
    with pytest.raises(NotRetriable, match=f"Job {job.id} is queued"):
        await job.retry()
    await fail(pool, job.id, end=End.answered(b"{}"))
    with pytest.raises(NotRetriable, match=f"Job {job.id} is succeeded"):
        await job.retry()
    with pytest.raises(JobNotFound):
        await headrace.retry(uuid4())
    assert await pool.fetchval("SELECT count(*) FROM headrace.jobs") == 1


async def test_a_second_retry_names_the_first(headrace: Headrace, pool: Pool) -> None:
    job = await headrace.enqueue(CHAT, BODY)
    await fail(pool, job.id)
    new = await job.retry()
    with pytest.raises(AlreadyRetried) as caught:
        await headrace.retry(str(job.id))
    assert caught.value.replaced_by == new.id
    await fail(pool, new.id)
    newest = await new.retry()
    assert (await newest.get()).replaces == new.id


async def test_a_cancelled_job_can_be_retried_by_its_name(headrace: Headrace, pool: Pool) -> None:
    job = await headrace.enqueue(CHAT, BODY)
    await job.cancel()
    await job.retry()
    with pytest.raises(JobCancelled):
        await job.result()


async def test_a_changed_body_is_checked_and_decides_the_route(headrace: Headrace, jobs: Jobs) -> None:
    job = await headrace.enqueue(CHAT, BODY)
    await fail(jobs.pool, job.id)
    with pytest.raises(InvalidRequest, match="messages: must be a list"):
        await job.retry({"model": "gpt-4o", "messages": []})
    assert (await job.get()).replaced_by is None
    new = await job.retry(OTHER_BODY)
    row = await jobs.row(new.id)
    assert (json.loads(row["body"]), row["route"]) == (OTHER_BODY, "gpt-4o")


async def test_a_body_is_checked_under_the_configuration_in_force(headrace: Headrace, jobs: Jobs) -> None:
    job = await headrace.enqueue(CHAT, BODY)
    await fail(jobs.pool, job.id)
    body = dead_letters.NewBody(b"{}", b"", (await job.get()).route, configuration=7)
    assert await dead_letters.retry_jobs(jobs.pool, [job.id], new_body=body) == []
    await jobs.configure({"defaults": {"any_model": False}})
    with pytest.raises(InvalidRequest, match="there is no route 'gpt-4o'"):
        await job.retry(OTHER_BODY)


async def test_an_idempotency_key_means_the_newest_job(headrace: Headrace, pool: Pool) -> None:
    first = await headrace.enqueue(CHAT, BODY, idempotency_key="k")
    await headrace.enqueue(CHAT, BODY, idempotency_key="another")
    await fail(pool, first.id)
    second = await first.retry()
    again = await headrace.enqueue(CHAT, BODY, idempotency_key="k")
    assert (again.id, again.existed) == (second.id, True)
    await fail(pool, second.id)
    third = await second.retry(OTHER_BODY)
    again = await headrace.enqueue(CHAT, OTHER_BODY, idempotency_key="k")
    assert (again.id, again.existed) == (third.id, True)
    with pytest.raises(IdempotencyConflict):
        await headrace.enqueue(CHAT, BODY, idempotency_key="k")


async def test_a_retry_has_its_time_anew(headrace: Headrace, jobs: Jobs, clock: Clock) -> None:
    soon, later = datetime.now(UTC) + HOUR, datetime.now(UTC) + 100 * HOUR
    slow = await headrace.enqueue(CHAT, BODY, ttl=HOUR, delay=MINUTE)
    missed = await headrace.enqueue(CHAT, BODY, deadline=soon, timeout=10 * MINUTE)
    ahead = await headrace.enqueue(CHAT, BODY, deadline=later)
    timed = await headrace.enqueue(CHAT, BODY, timeout=10 * HOUR)
    both = await headrace.enqueue(CHAT, BODY, timeout=10 * MINUTE, deadline=later)
    await fail(jobs.pool, timed.id, both.id)
    await clock.advance(2 * HOUR)
    assert {one.id for one in await lost.expire(jobs.pool)} == {slow.id, missed.id}
    await fail(jobs.pool, ahead.id)
    rows = {job.id: await jobs.row((await job.retry()).id) for job in (slow, missed, ahead, timed)}
    assert rows[slow.id]["start_by"] - rows[slow.id]["run_at"] == HOUR
    assert (rows[missed.id]["end_by"], rows[missed.id]["timeout"]) == (None, 10 * MINUTE)
    assert rows[ahead.id]["end_by"] == later
    assert (rows[timed.id]["end_by"], rows[timed.id]["timeout"]) == (None, 10 * HOUR)
    given = await headrace.retry(both.id, deadline=later - HOUR)
    assert (await given.get()).end_by == later - HOUR
    assert await lost.expire(jobs.pool) == []


async def test_a_deadline_that_is_given_to_a_job_without_one_needs_a_worker_that_knows_it(
    headrace: Headrace, jobs: Jobs
) -> None:
    job = await headrace.enqueue(CHAT, BODY)
    await fail(jobs.pool, job.id)
    new = await headrace.retry(job.id, deadline=datetime.now(UTC) + HOUR)
    assert (await jobs.row(new.id))["needs"] == [NEEDS_EXPIRY]
    with pytest.raises(InvalidRequest, match="deadline: must be a datetime with a time zone"):
        await headrace.retry(new.id, deadline=datetime(2030, 1, 1))  # noqa: DTZ001


async def test_two_retries_at_once_make_one_job(headrace: Headrace, pool: Pool) -> None:
    ids = await enqueue_many(headrace, 20)
    await fail(pool, *ids)
    async with pool.acquire() as one, one.transaction():
        first = await dead_letters.retry_jobs(one, ids[:10])
        second = asyncio.create_task(dead_letters.retry_jobs(pool, ids))
        await waits_for_lock(pool)
    assert {retried.old for retried in first} == set(ids[:10])
    assert {retried.old for retried in await second} == set(ids[10:])
    everybody = [headrace.retry(ids[0]) for _ in range(5)]
    assert {type(error) for error in await asyncio.gather(*everybody, return_exceptions=True)} == {
        AlreadyRetried
    }
    assert await pool.fetchval("SELECT count(*) FROM headrace.jobs") == 40


async def waits_for_lock(pool: Pool) -> None:
    """Wait until some statement of this database waits for another one's lock."""
    waiting = (
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE wait_event_type = 'Lock' AND datname = current_database()"
    )
    await eventually(lambda: pool.fetchval(waiting), bool)


async def test_a_handlers_job_is_retried_too_but_not_from_its_checkpoints(
    headrace: Headrace, jobs: Jobs
) -> None:
    first = await headrace.enqueue("sum-up", {"text": "long"})
    await first.cancel()
    await jobs.pool.execute(
        "INSERT INTO headrace.checkpoints (job_id, name, run, value, made_at)"
        " VALUES ($1, 'read', 1, 'x', headrace.now())",
        first.id,
    )
    second = await first.retry()
    before, row = await jobs.row(first.id), await jobs.row(second.id)
    assert only(row, KEPT) == only(before, KEPT)
    assert row["endpoint"] == "handler:sum-up"
    await second.cancel()
    third = await jobs.row((await second.retry({"text": "short"})).id)
    assert (json.loads(third["body"]), third["lane"]) == ({"text": "short"}, before["lane"])
    assert await jobs.pool.fetchval("SELECT array_agg(job_id) FROM headrace.checkpoints") == [first.id]


# The commands.


async def test_failures_of_one_kind_stand_together(
    headrace: Headrace, pool: Pool, command: Command, clock: Clock
) -> None:
    one, two, three, four, fine = await enqueue_many(headrace, 5)
    other = (await headrace.enqueue(CHAT, BODY, tenant="other")).id
    await fail_with(pool, one, ErrorClass.BAD_REQUEST, 'field "a" of request 17 is missing')
    await clock.advance(2 * HOUR)
    await fail_with(pool, two, ErrorClass.BAD_REQUEST, 'field "b" of request 4,711.5 is missing')
    await fail_with(pool, three, ErrorClass.TIMEOUT, "no answer came in time")
    await fail_with(pool, other, ErrorClass.TIMEOUT, f"no answer for {uuid4()}")
    await headrace.cancel(four)
    await fail(pool, fine, end=End.answered(b"{}"))
    shown = await command("failures", "--json")
    assert shown.answer["total"] == 4
    counts = [(group["class"], group["count"], group["job_id"]) for group in shown.rows("groups")]
    assert counts[0] == ("bad_request", 2, str(two))
    assert set(counts[1:]) == {("timeout", 1, str(three)), ("timeout", 1, str(other))}
    first = shown.rows("groups")[0]
    assert first["example"] == 'field "b" of request 4,711.5 is missing'
    assert datetime.fromisoformat(str(first["last"])) - datetime.fromisoformat(str(first["first"])) > HOUR
    for options, total in (
        (["--since", "1h"], 3),
        (["--tenant", "other"], 1),
        (["--class", "timeout"], 2),
        (["--class", "timeout", "--tenant", "default"], 1),
    ):
        assert (await command("failures", *options, "--json")).answer["total"] == total
    table = (await command("failures")).out
    assert str(first["fingerprint"]) in table
    assert "--fingerprint FINGERPRINT" in table
    retried = await command("retry", "--fingerprint", first["fingerprint"])
    assert (retried.code, retried.out) == (0, "2 jobs retried.\n")
    assert (await command("failures", "--json")).answer["total"] == 2


async def test_what_is_retried_is_chosen(headrace: Headrace, pool: Pool, command: Command) -> None:
    ids = await enqueue_many(headrace, 4)
    other = (await headrace.enqueue(CHAT, BODY, tenant="other")).id
    await fail(pool, *ids[:3], other)
    await headrace.cancel(ids[3])
    would = await command("retry", "--class", "bad_request", "--dry-run", "--json")
    assert would.answer == {"retried": 0, "would_retry": 4}
    assert (await command("retry", "--tenant", "other", "--since", "1h")).out.startswith("1 job retried: ")
    assert (await command("retry", "--class", "bad_request", "--json")).answer["retried"] == 3
    assert (await command("retry", "--since", "1h")).out == "0 jobs retried.\n"
    assert (await command("retry", ids[3])).out.startswith("1 job retried: ")
    assert await pool.fetchval("SELECT count(*) FROM headrace.jobs") == 10


async def test_a_named_job_that_cannot_be_retried_does_not_keep_the_others(
    headrace: Headrace, pool: Pool, command: Command
) -> None:
    done, failed, queued = await enqueue_many(headrace, 3)
    await fail(pool, done, end=End.answered(b"{}"))
    await fail(pool, failed)
    retried = await command("retry", done, failed, queued, failed)
    assert (retried.code, retried.out.count("1 job retried")) == (0, 1)
    assert f"Job {done} is succeeded" in retried.err
    assert f"Job {queued} is queued" in retried.err
    again = await command("retry", failed)
    assert again.code == 2
    assert again.err.startswith(f"headrace: Job {failed} was retried already: job ")


async def test_a_single_job_is_retried_with_another_body(
    headrace: Headrace, jobs: Jobs, command: Command
) -> None:
    (command.folder / "body.json").write_text(json.dumps(OTHER_BODY))
    ids = await enqueue_many(headrace, 2)
    await fail(jobs.pool, *ids)
    refused = await command("retry", "--class", "bad_request", "--body", "body.json")
    assert (refused.code, refused.err) == (
        2,
        "headrace: --body is the request of one job, and 2 are meant.\n",
    )
    done = await command("retry", ids[0], "--body", "body.json", "--json")
    row = await jobs.row(JobId(UUID(str(done.answer["job_id"]))))
    assert (row["route"], row["replaces"]) == ("gpt-4o", ids[0])
    old = await command("status", ids[0])
    assert f"replaced by {row['id']}" in old.out
    assert f"a retry of {ids[0]}" in (await command("status", row["id"])).out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "Say what to retry"),
        (["nonsense"], "'nonsense' is not the id of a job or a batch."),
        ([str(UUID(int=7))], f"There is no job and no batch {UUID(int=7)}."),
        (["--class", "sad"], "--class: 'sad' is not one of rate_limited, "),
        (["--fingerprint", "x"], "--fingerprint: 'x' is not one that"),
        (["--since", "yesterday"], "--since: must be a duration"),
        (["--tenant", "no spaces"], "tenant: must be 1 to 64"),
        (["--class", "timeout", "--body", "missing.json"], "missing.json cannot be read"),
    ],
)
async def test_a_retry_of_nobody_knows_what_is_refused(
    environment: None, command: Command, arguments: list[str], sentence: str
) -> None:
    refused = await command("retry", *arguments)
    assert refused.code == 2
    assert refused.err.startswith(f"headrace: {sentence}")


# Batches.


async def test_a_retried_batch_has_complete_results(
    environment: None, pool: Pool, jobs: Jobs, command: Command
) -> None:
    submitted = await command.submit(4, "--webhook", HOOK, "--json")
    batch = submitted.answer["batch_id"]
    ends = {1: End.answered(b'{"n": 1}'), 2: NO, 3: End.lost(), 4: End.answered(b'{"n": 4}')}
    await Endings(pool).end_batch(str(batch), ends.get)
    before = (await command("status", batch, "--json")).answer
    assert (before["succeeded"], before["failed"]) == (2, 2)
    assert (await command("failures", "--batch", batch, "--json")).answer["total"] == 2
    assert (await command("failures", "--batch", UUID(int=7))).code == 2
    assert (await command("retry", batch)).out == "2 jobs retried.\n"
    during = (await command("status", batch, "--json")).answer
    assert (during["enqueued"], during["succeeded"], during["failed"]) == (4, 2, 0)
    resumed = await command.submit(4, "--json")
    assert (resumed.answer["batch_id"], resumed.answer["enqueued"]) == (batch, 4)
    await Endings(pool).end_batch(str(batch), lambda line: End.answered(b'{"n": %d}' % line))
    done = await command("result", batch, "--output", "out.jsonl", "--errors", "err.jsonl", "--json")
    assert (done.code, done.answer["succeeded"], done.answer["failed"]) == (0, 4, 0)
    assert [row["custom_id"] for row in command.read("out.jsonl")] == [f"row-{n}" for n in range(1, 5)]
    assert command.read("err.jsonl") == []
    # Money that was spent on what was replaced was spent.
    assert done.answer["cost_nano_usd"] == 4 * COST
    assert done.answer["suspense_nano_usd"] == 10_000
    rows = await pool.fetch("SELECT job_id, event_type FROM headrace.deliveries")
    assert len({row["job_id"] for row in rows}) == len(rows) == 6


async def test_many_are_retried_in_pages_and_what_fails_meanwhile_is_left_alone(
    headrace: Headrace, jobs: Jobs, pool: Pool
) -> None:
    ids = await jobs.add(7)
    await fail(pool, *ids)
    until = await dead_letters.store_time(pool)
    seen: list[JobId] = []
    async for page in dead_letters.dead_letters(pool, Selection(), until, page=3):
        assert len(page) <= 3
        retried = await dead_letters.retry_jobs(pool, page)
        seen += [one.old for one in retried]
        assert len(seen) <= len(ids)
        await fail(pool, *[one.new for one in retried])
    assert sorted(seen) == sorted(ids)


async def test_a_cancelled_batch_is_cancelled_in_its_newest_jobs(
    environment: None, pool: Pool, command: Command
) -> None:
    batch = (await command.submit(2, "--json")).answer["batch_id"]
    await Endings(pool).end_batch(str(batch), lambda _: NO)
    await command("retry", batch)
    cancelled = await command("cancel", batch, "--json")
    assert cancelled.answer["cancelled"] == 2
    assert (await command("status", batch, "--json")).answer["failed"] == 2
