"""Whoever waits for a result is woken when the job has ended, and is told why there is none."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import pytest

from headrace_producer import Headrace, JobHandle, bells, run
from headrace_shared.dispatch import keys
from headrace_shared.dispatch.connection import Redis
from headrace_shared.dispatch.dispatch import Dispatch, Entry
from headrace_shared.errors import (
    HeadraceError,
    InvalidInput,
    JobCancelled,
    JobExpired,
    JobFailed,
    JobNotFound,
    ResultTimeout,
)
from headrace_shared.ids import CallNumber, WorkerId, hold_id
from headrace_shared.job import ClaimedJob
from headrace_shared.money import NanoUSD
from headrace_shared.outcome import Cancelled, ErrorClass, Expired, Failed, Failure, Outcome, Succeeded
from headrace_shared.store import claims, feed, money, runs
from headrace_shared.store.pool import Pool
from headrace_shared.testing.clock import script
from headrace_shared.usage import Usage

pytestmark = pytest.mark.conformance

CHAT = "/v1/chat/completions"
BODY: Mapping[str, object] = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello"}]}
ANSWER = b'{ "id": "chatcmpl-1", "choices": [{"message": {"content": "caf\xc3\xa9"}}] }'
WORKER = WorkerId("worker-1")
LEASE = timedelta(minutes=1)
LONG = timedelta(minutes=5)
NEVER = 3600.0
USAGE = Usage(prompt_tokens=9, cached_tokens=1, completion_tokens=12, reasoning_tokens=2)


class Runner:
    """Ends jobs as a worker does."""

    def __init__(self, pool: Pool, redis: Redis) -> None:
        self._pool = pool
        self._dispatch = Dispatch(redis)

    async def end(self, handle: JobHandle, outcome: Outcome, *, tell: bool = True) -> None:
        (job,) = (await claims.claim_jobs(self._pool, [handle.id], WORKER, LEASE)).jobs
        conclusions = [await self._answered(job)] if isinstance(outcome, Succeeded) else []
        result = (job.run, CallNumber(1)) if conclusions else None
        end = runs.RunEnd(job.id, job.run, outcome, attempts=1, result=result)
        ended = await runs.finish(self._pool, WORKER, 0, conclusions=conclusions, attempts=[], ends=[end])
        assert list(ended.states) == [(job.id, job.run)]
        if tell:
            await self._dispatch.finish([(Entry(job.queue, job.id), None)])

    async def _answered(self, job: ClaimedJob) -> runs.Conclusion:
        call = CallNumber(1)
        intent = runs.Intent(
            job_id=job.id,
            run=job.run,
            call=call,
            provider="openai",
            model="gpt-4o-mini-2024-07-18",
            hold_id=hold_id(job.id, job.run, call),
            held=NanoUSD(10_000),
            held_at=await self._pool.fetchval("SELECT headrace.now()"),
            scopes=("global", f"tenant:{job.queue.tenant}"),
            price_version="test",
        )
        assert await runs.open_calls(self._pool, await money.current_epoch(self._pool), [intent])
        return runs.Conclusion(
            job_id=job.id,
            run=job.run,
            call=call,
            state="answered",
            latency=timedelta(seconds=1),
            status=200,
            request_id="req_1",
            usage=USAGE,
            cost=NanoUSD(8_550),
            answer=ANSWER,
        )


class Line:
    """The way to Redis, which can be cut and mended."""

    def __init__(self, target: str, path: Path) -> None:
        self._target = urlsplit(target)
        self._path = path
        self._carried: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"unix://{self._path}?{self._target.query}"

    async def mend(self) -> None:
        self._server = await asyncio.start_unix_server(self._carry, self._path)

    async def cut(self) -> None:
        assert self._server
        self._server.close()
        self._path.unlink(missing_ok=True)
        for writer in self._carried:
            writer.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far = self._target
        there, back = await (
            asyncio.open_connection(far.hostname, far.port)
            if far.hostname
            else asyncio.open_unix_connection(far.path)
        )
        both = {writer, back}
        self._carried |= both
        await asyncio.gather(_copy(reader, back), _copy(there, writer))
        self._carried -= both


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while piece := await reader.read(65536):
            writer.write(piece)
    except ConnectionError:
        pass
    writer.close()


@pytest.fixture
def runner(pool: Pool, redis: Redis) -> Runner:
    return Runner(pool, redis)


@pytest.fixture
async def line(redis_url: str, tmp_path: Path) -> AsyncIterator[Line]:
    line = Line(redis_url, tmp_path / "line.sock")
    await line.mend()
    yield line
    await line.cut()


async def subscribed(redis: Redis, handle: JobHandle, subscribers: int = 1) -> None:
    """Wait until so many connections hear of a job."""
    ask = script("return redis.call('PUBSUB', 'NUMSUB', ARGV[1])[2]")
    while await redis.evaluate(ask, (), [keys.ended(handle.id)]) != subscribers:
        pass


async def test_a_waiter_is_woken_by_redis(
    headrace: Headrace, redis: Redis, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bells, "_POLL_SECONDS", NEVER)
    handle = await headrace.enqueue(CHAT, BODY)
    waiting = asyncio.create_task(handle.result(timeout=LONG))
    await subscribed(redis, handle)
    await runner.end(handle, Succeeded())
    result = await waiting
    assert (result.job_id, result.status, result.attempts) == (handle.id, 200, 2)
    assert (result.provider, result.model, result.request_id) == ("openai", "gpt-4o-mini-2024-07-18", "req_1")
    assert result.body == {"id": "chatcmpl-1", "choices": [{"message": {"content": "café"}}]}
    assert result.raw == ANSWER
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (9, 12)
    assert (result.usage.total_tokens, result.usage.cost_nano_usd) == (21, 8_550)
    assert result.usage.cost_usd == 0.00000855
    await subscribed(redis, handle, 0)


async def test_many_wait_for_many_over_one_connection(
    headrace: Headrace, redis: Redis, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bells, "_POLL_SECONDS", NEVER)
    handles = [await headrace.enqueue(CHAT, BODY) for _ in range(20)]
    waiting = [asyncio.create_task(each.result(timeout=LONG)) for each in handles for _ in range(3)]
    for handle in handles:
        await subscribed(redis, handle)
    await asyncio.gather(*(runner.end(handle, Succeeded()) for handle in handles))
    results = await asyncio.gather(*waiting)
    assert [result.job_id for result in results] == [each.id for each in handles for _ in range(3)]


async def test_a_lost_message_is_made_up_for(
    headrace: Headrace, redis: Redis, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bells, "_POLL_SECONDS", 0.01)
    handle = await headrace.enqueue(CHAT, BODY)
    waiting = asyncio.create_task(handle.result(timeout=LONG))
    await subscribed(redis, handle)
    await runner.end(handle, Succeeded(), tell=False)
    assert (await waiting).raw == ANSWER


async def test_without_redis_postgres_is_asked(postgres_url: str, runner: Runner) -> None:
    async with Headrace(postgres_url, "unix:///nowhere/valkey.sock") as headrace:
        handle = await headrace.enqueue(CHAT, BODY)
        waiting = asyncio.create_task(handle.result(timeout=LONG))
        await runner.end(handle, Succeeded())
        assert (await waiting).raw == ANSWER


async def test_redis_may_go_away_and_come_back_meanwhile(
    postgres_url: str, redis: Redis, line: Line, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bells, "_POLL_SECONDS", NEVER)
    monkeypatch.setattr(bells, "_POLL_SECONDS_WITHOUT_REDIS", 0.01)
    monkeypatch.setattr(bells, "_RECONNECT_SECONDS", 0.01)
    async with Headrace(postgres_url, line.url) as headrace:
        first, second = await headrace.enqueue(CHAT, BODY), await headrace.enqueue(CHAT, BODY)
        waiting = [asyncio.create_task(each.result(timeout=LONG)) for each in (first, second)]
        await subscribed(redis, second)
        await line.cut()
        await subscribed(redis, second, 0)
        await runner.end(first, Succeeded())
        assert (await waiting[0]).job_id == first.id
        await line.mend()
        await subscribed(redis, second)
        await runner.end(second, Succeeded())
        assert (await waiting[1]).job_id == second.id


@pytest.mark.parametrize(
    ("outcome", "kind", "message"),
    [
        (Failed(Failure(ErrorClass.BAD_REQUEST, "no")), JobFailed, "Job {} failed (bad_request): no"),
        (Cancelled(), JobCancelled, "Job {} was cancelled."),
        (Expired("its time ran out"), JobExpired, "Job {} expired: its time ran out"),
    ],
)
async def test_a_job_without_a_result_says_why(
    headrace: Headrace, runner: Runner, outcome: Outcome, kind: type[JobFailed], message: str
) -> None:
    handle = await headrace.enqueue(CHAT, BODY)
    await runner.end(handle, outcome)
    with pytest.raises(JobFailed) as failed:
        await headrace.result(str(handle.id))
    assert type(failed.value) is kind
    assert str(failed.value) == message.format(handle.id)


async def test_a_timeout_says_where_the_job_is(headrace: Headrace, pool: Pool, runner: Runner) -> None:
    handle = await headrace.enqueue(CHAT, BODY)
    with pytest.raises(ResultTimeout) as late:
        await handle.result(timeout=timedelta(milliseconds=10))
    assert str(late.value) == (
        f"Job {handle.id} has not ended within 0.01 s: it is queued, and no worker is alive "
        "(start one with 'headrace worker')."
    )
    await feed.register_worker(pool, WORKER, host="here", slots=1, lanes=[], alive=LEASE)
    with pytest.raises(ResultTimeout, match=r"within 0 s: it is queued\.$"):
        await handle.result(timeout=timedelta(0))
    await runner.end(handle, Succeeded())
    assert (await handle.result(timeout=timedelta(0))).raw == ANSWER


async def test_there_is_no_result_of_no_job(headrace: Headrace) -> None:
    with pytest.raises(JobNotFound):
        await headrace.result(uuid4())


async def test_a_client_that_closes_leaves_no_task_behind(environment: None) -> None:
    before = asyncio.all_tasks()
    async with Headrace() as headrace:
        handle = await headrace.enqueue(CHAT, BODY)
        with pytest.raises(ResultTimeout):
            await handle.result(timeout=timedelta(0))
        assert asyncio.all_tasks() > before
    assert asyncio.all_tasks() == before


async def test_a_client_may_close_at_any_moment_of_a_wait(environment: None) -> None:
    for turns in range(60):
        async with Headrace() as headrace:
            with pytest.raises(JobNotFound):
                await headrace.result(uuid4())
            for _ in range(turns):
                await asyncio.sleep(0)


TOO_LATE = ResultTimeout(job_id=uuid4(), seconds=1, state="queued")
NOT_A_NUMBER = InvalidInput(reason="The sun is no number.")


@pytest.mark.parametrize(("error", "code"), [(TOO_LATE, 1), (NOT_A_NUMBER, 2)])
def test_a_script_ends_with_one_sentence_and_the_code_of_the_command_line(
    error: HeadraceError, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    async def script() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run(script())
    assert ended.value.code == code
    assert capsys.readouterr().err == f"headrace: {error.message}\n"
