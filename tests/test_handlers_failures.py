"""What goes wrong in a handler: it raises, hangs, returns nonsense, is cancelled, or will not stop."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import timedelta
from types import SimpleNamespace

import pytest
from handler_stage import CHAT, QUICK, Application, Document, Summary, question
from pydantic import BaseModel, ConfigDict

from headrace_producer import Headrace
from headrace_shared.budgets import Budgets
from headrace_shared.dispatch.dispatch import Dispatch
from headrace_shared.errors import CallFailed, JobFailed
from headrace_shared.ids import JobId
from headrace_shared.job import JobState
from headrace_shared.money import NanoUSD
from headrace_shared.outcome import ErrorClass
from headrace_shared.store.money import BudgetPolicy, WindowKind
from headrace_shared.store.pool import Pool
from headrace_shared.testing.jobs import Jobs
from headrace_shared.testing.scripted_provider import ScriptedProvider, completion, refusal
from headrace_workers import Context, handler
from headrace_workers.handlers.registry import Registered
from headrace_workers.steps import handle
from headrace_workers.testing import running_worker

pytestmark = pytest.mark.usefixtures("environment")

PATIENCE = timedelta(seconds=30)
MOMENT = timedelta(milliseconds=50)


@pytest.fixture
def jobs(pool: Pool, dispatch: Dispatch) -> Jobs:
    return Jobs(pool, dispatch)


@pytest.fixture
def application(monkeypatch: pytest.MonkeyPatch) -> Application:
    return Application(monkeypatch)


class Stage:
    """One job of one handler."""

    def __init__(self, headrace: Headrace, jobs: Jobs, application: Application) -> None:
        self.headrace = headrace
        self.jobs = jobs
        self._application = application

    async def failed(
        self, registered: Registered, *, body: object = None, max_attempts: int = 2
    ) -> JobFailed:
        """Run a job until it has failed, and say how."""
        await self.jobs.configure(QUICK)
        given = body if isinstance(body, bytes | str) else Document()
        job = await self.headrace.enqueue(registered.handler.name, given, max_attempts=max_attempts)
        async with running_worker(handlers=self.handlers(registered)):
            with pytest.raises(JobFailed) as caught:
                await job.result(timeout=PATIENCE)
        assert await self.jobs.spend() == await self.jobs.ledger()
        return caught.value

    async def attempts(self, error: JobFailed) -> list[tuple[int, str, str]]:
        found = await self.headrace.attempts(error.job_id)
        return [(one.number, one.outcome, one.error_class or "") for one in found]

    def handlers(self, registered: Registered) -> tuple[str, ...]:
        return self._application.with_handlers(registered)


@pytest.fixture
def stage(headrace: Headrace, jobs: Jobs, application: Application, scripted: ScriptedProvider) -> Stage:
    return Stage(headrace, jobs, application)


async def test_an_exception_is_tried_again_and_kept_with_the_job(stage: Stage) -> None:
    seen: list[int] = []

    @handler("raise")
    async def raising(ctx: Context, _document: Document) -> Summary:
        seen.append(ctx.attempt)
        raise ValueError("no \0 good \ud800" + "x" * 1000)

    error = await stage.failed(raising)
    assert seen == [1, 2]
    assert error.error_class == ErrorClass.HANDLER
    assert error.error.startswith("ValueError: no  good ?xxx")
    assert len(error.error) == 500
    assert await stage.attempts(error) == [(1, "retried", "handler"), (2, "failed", "handler")]


async def test_an_input_that_is_none_fails_at_once(stage: Stage) -> None:
    @handler("strict")
    async def strict(_ctx: Context, document: Document) -> Summary:
        raise NotImplementedError(document)

    error = await stage.failed(strict, body=b'{"text": 17}')
    assert error.error_class == ErrorClass.HANDLER
    assert error.error == "its input is no Document: text: must be a valid string"
    assert len(await stage.attempts(error)) == 1


class Loose(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)

    value: object


RESULTS: dict[str, tuple[object, str]] = {
    "nothing": (None, "result: is no Loose (must be a valid dictionary or instance of Loose)"),
    "another type": (Summary(text="x"), "result: is no Loose (must be a valid dictionary or"),
    "NaN": (Loose(value=[float("nan")]), "result: contains a number that is not finite"),
    "a surrogate": (Loose(value="\ud800"), "result: contains half of a surrogate pair"),
    "an object": (Loose(value=object()), "result: cannot be written as JSON (PydanticSerializationError"),
    "too much": (Loose(value="x" * 1_100_000), "result: is 1,100,012 bytes, more than the 1,048,576"),
    "too deep": (Loose(value=None), "result: cannot be written as JSON"),
}


@pytest.mark.parametrize("name", RESULTS)
async def test_a_result_that_cannot_be_kept_fails_and_says_why(stage: Stage, name: str) -> None:
    value, reason = RESULTS[name]
    if isinstance(value, Loose) and name == "too deep":
        nested: list[object] = []
        for _ in range(10_000):
            nested = [nested]
        value.value = nested

    @handler("return")
    async def returning(_ctx: Context, _document: Document) -> Loose:
        # What the types do not allow, as code without types may.
        returned: Loose = SimpleNamespace(value=value).value
        return returned

    error = await stage.failed(returning)
    assert error.error_class == ErrorClass.HANDLER
    assert error.error.startswith(reason)
    assert len(await stage.attempts(error)) == 1


async def test_a_call_that_is_refused_for_good_ends_the_job_for_its_reason(
    stage: Stage, scripted: ScriptedProvider
) -> None:
    @handler("refused")
    async def refused(ctx: Context, _document: Document) -> Summary:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(ctx.llm(CHAT, question()))
        raise NotImplementedError

    scripted.script(refusal(400, "This prompt is wrong."))
    error = await stage.failed(refused)
    assert error.error_class == ErrorClass.BAD_REQUEST
    assert error.error == "400: This prompt is wrong."
    assert await stage.attempts(error) == [(1, "failed", "bad_request")]


async def test_a_call_is_tried_no_more_often_than_a_job(stage: Stage, scripted: ScriptedProvider) -> None:
    @handler("unlucky")
    async def unlucky(ctx: Context, _document: Document) -> Summary:
        return Summary(text=(await ctx.llm(CHAT, question())).text)

    scripted.script(refusal(500, "No."))
    error = await stage.failed(unlucky, max_attempts=4)
    assert error.error_class == ErrorClass.TRANSIENT
    assert len(scripted.requests) == 4
    assert await stage.attempts(error) == [(4, "failed", "transient")]


async def test_a_handler_may_do_without_a_call_that_failed(
    stage: Stage, headrace: Headrace, scripted: ScriptedProvider
) -> None:
    @handler("fall-back")
    async def fall_back(ctx: Context, _document: Document) -> Summary:
        try:
            await ctx.llm(CHAT, question("dangerous"), name="first")
        except CallFailed as error:
            answer = await ctx.llm(CHAT, question("harmless"), name="second")
            return Summary(text=f"{error.name}: {error.error_class}; {answer.text}")
        raise NotImplementedError

    scripted.script(refusal(400, "No.", code="content_filter"), completion())
    job = await headrace.enqueue("fall-back", Document())
    async with running_worker(handlers=stage.handlers(fall_back)):
        result = await job.result(timeout=PATIENCE)
    assert result.parse(Summary).text == "first: content_filter; Hello"


async def test_an_exhausted_budget_ends_the_job_for_its_reason(stage: Stage, budgets: Budgets) -> None:
    @handler("dear")
    async def dear(ctx: Context, _document: Document) -> Summary:
        return Summary(text=(await ctx.llm(CHAT, question())).text)

    await budgets.set("tenant:default", WindowKind.TOTAL, NanoUSD(1_000), BudgetPolicy.REJECT)
    error = await stage.failed(dear)
    assert error.error_class == ErrorClass.BUDGET_EXHAUSTED
    assert await stage.jobs.calls(JobId(error.job_id)) == []


async def step_of(value: object) -> object:
    return value


class Opaque:
    """Nothing that JSON has a word for."""


async def opaque() -> Opaque:
    raise NotImplementedError


async def promised_text() -> str:
    wrong: str = SimpleNamespace(value=17).value
    return wrong


async def twice(ctx: Context) -> None:
    await ctx.step("same", step_of, 1)
    await ctx.step("same", step_of, 1)


RESULT = "InvalidRequest: result:"
NAME = "InvalidRequest: name: must be 1 to 128 printable characters, the first not #."
MISUSES: dict[str, tuple[Callable[[Context], Awaitable[object]], str]] = {
    "NaN": (lambda ctx: ctx.step("x", step_of, [float("nan")]), f"{RESULT} contains a number that is not"),
    "a surrogate": (lambda ctx: ctx.step("x", step_of, "\ud800"), f"{RESULT} contains half of a surrogate"),
    "an object": (lambda ctx: ctx.step("x", step_of, object()), f"{RESULT} cannot be written as JSON (Pyd"),
    "opaque": (lambda ctx: ctx.step("x", opaque), f"{RESULT} of {Opaque!r} cannot be written as JSON."),
    "another type": (lambda ctx: ctx.step("x", promised_text), f"{RESULT} cannot be written as JSON (Pyd"),
    "twice": (twice, "InvalidRequest: name: 'same' is used twice in one run."),
    "no name": (lambda ctx: ctx.step("", step_of, 1), NAME),
    "ours": (lambda ctx: ctx.llm(CHAT, question(), name="#1"), NAME),
    "progress": (lambda ctx: ctx.progress(float("nan")), "InvalidRequest: progress: must be from 0 to 1."),
    "endpoint": (lambda ctx: ctx.llm("/v1/x", question()), "InvalidRequest: endpoint: '/v1/x' is not known"),
    "model": (lambda ctx: ctx.llm(CHAT, {}), "InvalidRequest: model: must be a string that names a model."),
}


@pytest.mark.parametrize("what", MISUSES)
async def test_what_cannot_be_done_fails_at_once_and_says_why(stage: Stage, what: str) -> None:
    do, reason = MISUSES[what]

    @handler("misuse")
    async def misused(ctx: Context, _document: Document) -> Summary:
        await do(ctx)
        raise NotImplementedError

    error = await stage.failed(misused)
    assert error.error_class == ErrorClass.HANDLER
    assert error.error.startswith(reason)
    assert len(await stage.attempts(error)) == 1


@pytest.mark.parametrize("how", ["exit", "cancel", "interrupt"])
async def test_a_handler_that_would_end_its_worker_only_fails(
    stage: Stage, headrace: Headrace, how: str
) -> None:
    @handler("end")
    async def end(_ctx: Context, _document: Document) -> Summary:
        match how:
            case "exit":
                raise SystemExit(3)
            case "cancel":
                raise asyncio.CancelledError
            case _:
                raise KeyboardInterrupt

    error = await stage.failed(end)
    assert error.error_class == ErrorClass.HANDLER
    assert [outcome for _, outcome, _ in await stage.attempts(error)] == ["retried", "failed"]


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
async def test_a_task_of_a_handler_that_would_end_its_worker_only_fails_the_handler(
    stage: Stage, error: BaseException
) -> None:
    began: list[str] = []

    async def deeper() -> None:
        raise error

    async def part() -> None:
        await asyncio.create_task(deeper())

    async def never() -> None:
        began.append("never")

    @handler("end")
    async def end(_ctx: Context, _document: Document) -> Summary:
        asyncio.create_task(never()).cancel()
        await asyncio.gather(part(), asyncio.Event().wait())
        raise NotImplementedError

    failed = await stage.failed(end)
    assert (failed.error_class, failed.error) == (ErrorClass.HANDLER, f"Exited: {type(error).__name__}")
    assert began == []


async def test_a_handler_that_takes_too_long_is_cancelled_and_tried_again(
    stage: Stage, scripted: ScriptedProvider
) -> None:
    cancelled: list[int] = []

    @handler("slow", timeout=timedelta(milliseconds=300))
    async def slow(ctx: Context, _document: Document) -> Summary:
        try:
            return Summary(text=(await ctx.llm(CHAT, question())).text)
        except asyncio.CancelledError:
            cancelled.append(ctx.attempt)
            raise

    scripted.open.clear()
    error = await stage.failed(slow)
    assert (error.error_class, cancelled) == (ErrorClass.TIMEOUT, [1, 2])
    assert error.error == "handler slow took longer than 0:00:00.300000"
    calls = await stage.jobs.calls(JobId(error.job_id))
    assert {row["state"] for row in calls} <= {"suspense", "failed"}
    assert len(await stage.attempts(error)) == 2


class Hanging:
    """A handler that is in a call when it is stopped, and says that it was."""

    def __init__(self) -> None:
        self.stopped = asyncio.Event()
        self.handler = handler("hang")(self._hang)

    async def _hang(self, ctx: Context, document: Document) -> Summary:
        call = asyncio.ensure_future(ctx.llm(CHAT, question()))
        try:
            if document.text == "background":
                await asyncio.Event().wait()
            await call
        finally:
            self.stopped.set()
        raise NotImplementedError


@pytest.mark.parametrize("how", ["cancelled", "timeout", "background"])
async def test_a_call_of_a_handler_that_is_stopped_is_concluded_before_its_job_ends(
    stage: Stage, scripted: ScriptedProvider, how: str
) -> None:
    scripted.open.clear()
    hanging = Hanging()
    timeout = timedelta(seconds=3) if how == "timeout" else None
    job = await stage.headrace.enqueue("hang", Document(text=how), timeout=timeout)
    async with running_worker(handlers=stage.handlers(hanging.handler)):
        await scripted.arrived(1)
        if how != "timeout":
            await job.cancel()
        (ending,) = await stage.jobs.ended([job.id])
        (call,) = await stage.jobs.calls(job.id)
    assert ending.job.state is (JobState.EXPIRED if how == "timeout" else JobState.CANCELLED)
    assert hanging.stopped.is_set()
    assert (call["state"], call["suspense_nano"]) == ("suspense", call["held_nano"])
    assert await stage.jobs.spend() == await stage.jobs.ledger()


async def test_a_handler_that_ignores_its_cancellation_is_left_alone_and_can_write_nothing(
    stage: Stage, headrace: Headrace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(handle, "GRACE", MOMENT)
    begun, go_on, tried = asyncio.Event(), asyncio.Event(), asyncio.Event()
    wrote: list[str] = []

    async def write() -> str:
        wrote.append("written")
        return "written"

    @handler("stubborn")
    async def stubborn(ctx: Context, _document: Document) -> Summary:
        begun.set()
        while not go_on.is_set():
            try:
                await go_on.wait()
            except asyncio.CancelledError:
                continue
        try:
            await ctx.step("late", write)
        finally:
            tried.set()
        return Summary(text="late")

    job = await headrace.enqueue("stubborn", Document())
    other = await headrace.enqueue(CHAT, question())
    with caplog.at_level(logging.ERROR):
        async with running_worker(handlers=stage.handlers(stubborn), concurrency=1):
            await begun.wait()
            await job.cancel()
            (ending,) = await stage.jobs.ended([job.id])
            assert ending.job.state is JobState.CANCELLED
            await other.result(timeout=PATIENCE)
            go_on.set()
            await tried.wait()
    assert wrote == []
    assert await stage.jobs.pool.fetch("SELECT FROM headrace.checkpoints") == []
    (said,) = [one.getMessage() for one in caplog.records if "ignores" in one.getMessage()]
    assert said.startswith("handler stubborn ignores that it was cancelled (at ")
    assert "test_handlers_failures.py" in said


async def test_a_handler_that_holds_up_the_end_of_its_run_changes_nothing_by_it(
    stage: Stage, headrace: Headrace, scripted: ScriptedProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handle, "GRACE", MOMENT)

    @handler("greedy")
    async def greedy(ctx: Context, document: Document) -> Summary:
        try:
            await ctx.llm(CHAT, question())
        except BaseException:  # noqa: BLE001 - what an application should not do
            if document.text == "hang":
                await asyncio.Event().wait()
        return Summary(text="without an answer")

    scripted.script(refusal(429, "Later.", headers={"retry-after": "60"}))
    waiting = [await headrace.enqueue("greedy", Document(text=text)) for text in ("return", "hang")]
    async with running_worker(handlers=stage.handlers(greedy)):
        for job in waiting:
            row = await stage.jobs.until(job.id, lambda row: row["waiting_for"] == "retry")
            assert (row["state"], row["attempts"], row["error_class"]) == ("queued", 1, "rate_limited")


async def test_a_call_that_a_handler_leaves_behind_is_paid_and_booked(
    stage: Stage, headrace: Headrace, scripted: ScriptedProvider
) -> None:
    left: list[asyncio.Task[object]] = []

    @handler("hasty")
    async def hasty(ctx: Context, _document: Document) -> Summary:
        async def call() -> object:
            return await ctx.llm(CHAT, question())

        left.append(asyncio.create_task(call()))
        await scripted.arrived(1)
        asyncio.get_running_loop().call_later(0.05, scripted.open.set)
        return Summary(text="done")

    scripted.open.clear()
    job = await headrace.enqueue("hasty", Document())
    async with running_worker(handlers=stage.handlers(hasty)):
        result = await job.result(timeout=PATIENCE)
    assert [row["state"] for row in await stage.jobs.calls(job.id)] == ["answered"]
    assert result.usage.cost_nano_usd > 0
    assert await stage.jobs.spend() == await stage.jobs.ledger()
    # It gets no answer any more: its run is over.
    with pytest.raises(BaseException, match=r"^$"):
        await left[0]
