"""Handlers of an application's own: enqueued by name, run with calls, steps and progress, read back."""

import asyncio
import json
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import pytest
from handler_stage import CHAT, Application, Document, Summary, question
from pydantic import BaseModel

from headrace_producer import Headrace, cli, errors
from headrace_shared.dispatch.dispatch import Dispatch
from headrace_shared.errors import InvalidHandler, InvalidRequest
from headrace_shared.job import JobState
from headrace_shared.store import feed
from headrace_shared.store.pool import Pool
from headrace_shared.testing.jobs import Jobs
from headrace_shared.testing.simulated_provider import SimulatedProvider
from headrace_workers import Context, Depends, handler
from headrace_workers.handlers.loading import load_handlers, open_handlers
from headrace_workers.testing import running_worker

pytestmark = pytest.mark.usefixtures("environment")

PATIENCE = timedelta(seconds=30)


@pytest.fixture
def jobs(pool: Pool, dispatch: Dispatch) -> Jobs:
    return Jobs(pool, dispatch)


@pytest.fixture
def application(monkeypatch: pytest.MonkeyPatch) -> Application:
    return Application(monkeypatch)


@handler("summarise")
async def summarise(ctx: Context, document: Document) -> Summary:
    parts = document.text.split()
    answers = await asyncio.gather(*(ctx.llm(CHAT, question(part)) for part in parts))
    return Summary(text=" ".join(answer.text for answer in answers))


async def test_a_handler_is_run_like_any_job_and_its_calls_are_on_the_bill(
    headrace: Headrace, jobs: Jobs, provider: SimulatedProvider, application: Application
) -> None:
    job = await headrace.enqueue("summarise", Document(), webhook="https://example.com/hook")
    async with running_worker(handlers=application.with_handlers(summarise)):
        result = await job.result(timeout=PATIENCE)
    assert "simulated" in result.parse(Summary).text
    assert result.body == json.loads(result.raw)
    assert (result.status, result.model, result.provider, result.attempts) == (None, None, None, 1)
    books = provider.books.total
    assert (books.requests, books.answered) == (6, 6)
    assert result.usage.prompt_tokens == books.prompt_tokens
    assert result.usage.completion_tokens == books.completion_tokens
    assert result.usage.cost_nano_usd > 0
    calls = await jobs.calls(job.id)
    assert [(row["run"], row["call"], row["state"]) for row in calls] == [
        (1, number, "answered") for number in range(1, 7)
    ]
    assert {row["endpoint"] for row in calls} == {CHAT}
    assert len({(row["step"], row["digest"]) for row in calls}) == 6
    assert await jobs.spend() == await jobs.ledger()
    (delivery,) = await jobs.deliveries(job.id)
    assert json.loads(delivery["payload"])["data"]["usage"]["cost_nano_usd"] == result.usage.cost_nano_usd


async def test_a_worker_without_the_handler_never_sees_its_jobs(
    headrace: Headrace, jobs: Jobs, provider: SimulatedProvider, application: Application
) -> None:
    job = await headrace.enqueue("summarise", {"text": "Hi"})
    plain = await headrace.enqueue(CHAT, question())
    async with running_worker():
        await plain.result(timeout=PATIENCE)
        with pytest.raises(errors.ResultTimeout, match="no worker that is alive has the handler summarise"):
            await job.result(timeout=timedelta(0))
    row = await jobs.row(job.id)
    assert (row["state"], row["run"], row["lane"]) == (JobState.QUEUED, 0, "default@summarise")
    async with running_worker(handlers=application.with_handlers(summarise)):
        assert (await job.result(timeout=PATIENCE)).parse(Summary).text


async def test_a_worker_serves_its_handlers_in_its_lanes_alone(
    headrace: Headrace, pool: Pool, jobs: Jobs, provider: SimulatedProvider, application: Application
) -> None:
    urgent = await headrace.enqueue("summarise", Document(), lane="interactive")
    other = await headrace.enqueue("summarise", Document(), lane="batch")
    handlers = application.with_handlers(summarise)
    async with running_worker(lanes=("interactive",), handlers=handlers):
        await urgent.result(timeout=PATIENCE)
        (worker,) = await feed.live_workers(pool)
        assert set(worker.lanes) == {"interactive", "interactive@summarise"}
    assert (await other.get()).state is JobState.QUEUED


async def test_a_handler_knows_its_job(
    headrace: Headrace, provider: SimulatedProvider, application: Application
) -> None:
    seen: list[object] = []

    @handler("look")
    async def look(ctx: Context, document: Document) -> Summary:
        seen.extend((ctx.job_id, ctx.tenant, ctx.metadata, ctx.attempt, ctx.run))
        return Summary(text=document.text)

    job = await headrace.enqueue("look", Document(), tenant="acme", metadata={"order": "17"})
    async with running_worker(handlers=application.with_handlers(look)):
        await job.result(timeout=PATIENCE)
    assert seen == [job.id, "acme", {"order": "17"}, 1, 1]


async def test_a_registered_function_can_be_called_as_it_is() -> None:
    @handler("echo")
    async def echo(_ctx: Context, document: Document) -> Summary:
        return Summary(text=document.text)

    bare = object.__new__(Context)
    assert await echo(bare, Document(text="x")) == Summary(text="x")


async def test_progress_is_told_now_and_then_and_its_last_word_as_well(
    headrace: Headrace,
    jobs: Jobs,
    provider: SimulatedProvider,
    application: Application,
    capsys: pytest.CaptureFixture[str],
) -> None:
    go_on = asyncio.Event()

    @handler("read")
    async def read(ctx: Context, _document: Document) -> Summary:
        for number in range(100):
            await ctx.progress(number / 100, f"page {number}\0\ud800")
        await go_on.wait()
        return Summary(text="")

    job = await headrace.enqueue("read", Document())
    async with running_worker(handlers=application.with_handlers(read)):
        row = await jobs.until(job.id, lambda row: row["progress"] is not None)
        assert (round(row["progress"], 2), row["progress_note"]) == (0.99, "page 99?")
        told = await job.get()
        assert told.progress_note == "page 99?"
        await asyncio.to_thread(cli.run, ["status", str(job.id)])
        printed = capsys.readouterr().out
        assert "handler read, tenant default, lane default" in printed
        assert "99% done: page 99?" in printed
        go_on.set()
        await job.result(timeout=PATIENCE)


class Log(list[str]):
    """What was opened and closed, in order."""


async def test_a_dependency_lives_as_long_as_the_worker(
    headrace: Headrace, provider: SimulatedProvider, application: Application
) -> None:
    log = Log()

    def read_settings() -> str:
        log.append("settings")
        return "https://example.com"

    async def open_client(url: Annotated[str, Depends(read_settings)]) -> AsyncGenerator[str, None]:
        log.append("client opened")
        yield f"client of {url}"
        log.append("client closed")

    def open_file(client: Annotated[str, Depends(open_client)]) -> Generator[str, None, None]:
        log.append(f"file by {client}")
        yield "file"
        log.append("file closed")

    @handler("fetch")
    async def fetch(
        _ctx: Context,
        document: Document,
        file: Annotated[str, Depends(open_file)],
        client: Annotated[str, Depends(open_client)],
        depth: int = 3,
    ) -> Summary:
        log.append(document.text)
        return Summary(text=f"{client}, {file}, {depth}")

    handlers = application.with_handlers(fetch)
    async with running_worker(handlers=handlers):
        for text in ("first", "second"):
            job = await headrace.enqueue("fetch", Document(text=text))
            result = await job.result(timeout=PATIENCE)
            assert result.parse(Summary).text == "client of https://example.com, file, 3"
    assert log == [
        "settings",
        "client opened",
        "file by client of https://example.com",
        "first",
        "second",
        "file closed",
        "client closed",
    ]


async def test_a_dependency_that_fails_is_named(application: Application) -> None:
    def broken() -> str:
        raise OSError("no such host")

    @handler("fetch")
    async def fetch(_ctx: Context, _document: Document, url: Annotated[str, Depends(broken)]) -> Summary:
        return Summary(text=url)

    with pytest.raises(
        InvalidHandler, match=r"handler 'fetch', dependency .*broken: failed \(OSError: no such"
    ):
        async with open_handlers(application.with_handlers(fetch)):
            pass


def not_async(ctx: Context, document: Document) -> Summary:
    raise NotImplementedError


async def without_input(ctx: Context) -> Summary:
    raise NotImplementedError


async def with_plain_input(ctx: Context, document: dict[str, str]) -> Summary:
    raise NotImplementedError


async def with_plain_result(ctx: Context, document: Document) -> str:
    raise NotImplementedError


async def with_more(ctx: Context, document: Document, more: int) -> Summary:
    raise NotImplementedError


async def with_unknown(ctx: Context, document: Document) -> Summary:
    raise NotImplementedError


with_unknown.__annotations__["document"] = "Unknown"


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (not_async, "handler 'x': must be an async function"),
        (without_input, "handler 'x': must take a Context and its input as its first parameters"),
        (with_plain_input, "handler 'x': its input must be annotated as a pydantic model"),
        (with_plain_result, "handler 'x': its result must be annotated as a pydantic model"),
        (with_more, "handler 'x': nothing says what more is given: annotate it with Depends(...)"),
        (with_unknown, "handler 'x': its annotations cannot be read (name 'Unknown' is not defined)"),
    ],
)
def test_a_function_that_cannot_be_a_handler_is_refused(
    function: Callable[..., Awaitable[Summary]], reason: str
) -> None:
    with pytest.raises(InvalidHandler) as caught:
        handler("x")(function)
    assert caught.value.message == f"{reason}."


@pytest.mark.parametrize("name", ["", "Summarise", "a b", "x" * 65, "a:b", "a@b", "a/b"])
async def test_a_name_that_is_none_is_refused(headrace: Headrace, name: str) -> None:
    with pytest.raises(InvalidHandler, match="a name is 1 to 64 lower-case letters"):
        handler(name)(with_more)
    with pytest.raises(InvalidRequest) as caught:
        await headrace.enqueue(name, Document())
    assert caught.value.field == "endpoint"
    assert "neither a path that begins with / nor a handler's name" in caught.value.message


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("application_that_is_not_there", "there is no module application_that_is_not_there"),
        ("own.no_such", "there is no module own.no_such"),
        ("own.broken", "cannot be imported (ValueError: at import)"),
        ("own.empty", "has no handler (a function with @handler)"),
        ("own.twice", "the name 'twin' is used twice, here and in own.twice"),
        ("own.empty:Empty", "the module own.empty has no Empty"),
        ("own.empty:value", "is no handler (a function with @handler)"),
        ("not a module", "must be module or module:attribute"),
    ],
)
def test_a_module_without_its_handler_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, reason: str
) -> None:
    (tmp_path / "own").mkdir()
    files = {"__init__": "", "broken": "raise ValueError('at import')", "empty": "value = 1", "twice": TWICE}
    for name, text in files.items():
        (tmp_path / "own" / f"{name}.py").write_text(text)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "own", raising=False)  # of the test before, whose folder is gone
    with pytest.raises(InvalidHandler) as caught:
        load_handlers([place])
    assert caught.value.message.endswith(f": {reason}.")


TWICE = """
from pydantic import BaseModel
from headrace_workers import Context, handler
class Model(BaseModel): pass
@handler("twin")
async def one(ctx: Context, given: Model) -> Model: ...
@handler("twin")
async def other(ctx: Context, given: Model) -> Model: ...
"""


def test_a_handler_that_two_modules_name_is_one(
    application: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = (*application.with_handlers(summarise), *Application(monkeypatch).with_handlers(summarise))
    assert list(load_handlers(places)) == ["summarise"]
    assert list(load_handlers([f"{places[0]}:handler_0"])) == ["summarise"]


class Odd(BaseModel):
    value: object


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (Odd(value=[{"x": float("nan")}]), "body: contains a number that is not finite"),
        (Odd(value="\ud800"), "body: contains half of a surrogate pair"),
        (Odd(value=object()), "body: cannot be written as JSON"),
        (Odd(value="\0"), "body.value: contains a NUL character"),
        ("[1]", "body: must be a JSON object"),
        (b"{", "body: is not JSON"),
        ({"text": "x" * 2_000_000}, "body: is 2,000,011 bytes, more than"),
    ],
)
async def test_an_input_that_cannot_be_kept_is_refused(
    headrace: Headrace, body: BaseModel | str | bytes | dict[str, object], reason: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await headrace.enqueue("summarise", body)
    assert caught.value.message.startswith(reason)


async def test_equal_inputs_under_one_key_are_one_job(headrace: Headrace) -> None:
    first = await headrace.enqueue("summarise", Document(text="x"), idempotency_key="k")
    second = await headrace.enqueue("summarise", {"text": "x"}, idempotency_key="k")
    assert (second.id, second.existed) == (first.id, True)
    with pytest.raises(errors.IdempotencyConflict):
        await headrace.enqueue("other", {"text": "x"}, idempotency_key="k")


async def test_the_result_is_printed(
    headrace: Headrace,
    provider: SimulatedProvider,
    application: Application,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = await headrace.enqueue("summarise", Document(text="Hi"))
    async with running_worker(handlers=application.with_handlers(summarise)):
        result = await job.result(timeout=PATIENCE)
    assert await asyncio.to_thread(cli.run, ["result", str(job.id), "--json"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["response"] == result.body
    assert (last["status"], last["endpoint"]) == ("succeeded", "handler:summarise")
