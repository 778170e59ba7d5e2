"""Handlers in worker processes that are killed, stopped, and left with a handler that kills them."""

import asyncio
import signal
from datetime import timedelta
from pathlib import Path

import pytest
from handler_stage import Document, Summary
from worker_processes import gone, worker

from headrace_producer import Headrace, cli
from headrace_shared.dispatch.dispatch import Dispatch
from headrace_shared.job import JobState
from headrace_shared.outcome import ErrorClass
from headrace_shared.store.pool import Pool
from headrace_shared.testing.jobs import Jobs
from headrace_shared.testing.scripted_provider import ScriptedProvider, completion
from headrace_shared.testing.simulated_provider import SimulatedProvider

pytestmark = pytest.mark.usefixtures("environment")

PATIENCE = timedelta(seconds=60)
EXAMPLES = Path(__file__).parents[1] / "examples"

MODULE = """
import asyncio, os
from pydantic import BaseModel
from headrace_workers import Context, handler

class Document(BaseModel):
    text: str

class Summary(BaseModel):
    text: str

def question(text):
    return {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": text}]}

@handler("two")
async def two(ctx: Context, document: Document) -> Summary:
    answers = [await ctx.llm("/v1/chat/completions", question(text)) for text in ("first", "second")]
    return Summary(text=" ".join(f"{one.text}:{one.replayed}" for one in answers))

@handler("deadly")
async def deadly(ctx: Context, document: Document) -> Summary:
    os._exit(7)

@handler("stubborn")
async def stubborn(ctx: Context, document: Document) -> Summary:
    await ctx.progress(0.5)
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            pass
"""


@pytest.fixture
def jobs(pool: Pool, dispatch: Dispatch) -> Jobs:
    return Jobs(pool, dispatch)


@pytest.fixture
def environment_of_app(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "own_tasks.py").write_text(MODULE)
    return {"PYTHONPATH": str(tmp_path), "HEADRACE_HANDLERS": "own_tasks"}


async def test_a_killed_worker_leaves_its_answers_to_the_next(
    headrace: Headrace, jobs: Jobs, scripted: ScriptedProvider, environment_of_app: dict[str, str]
) -> None:
    scripted.script(completion("one"), completion("lost"), completion("two"))
    scripted.open.clear()
    job = await headrace.enqueue("two", Document())
    async with worker(environment=environment_of_app) as killed:
        await scripted.arrived(1)
        # Whoever waits is answered, and nobody after that.
        scripted.open.set()
        scripted.open.clear()
        await scripted.arrived(2)
        killed.kill()
        await killed.wait()
    scripted.open.set()
    async with worker(environment=environment_of_app):
        result = await job.result(timeout=PATIENCE)
    text = result.parse(Summary).text
    answers = [request for request in scripted.requests if b"first" in request]
    assert (len(answers), text.split()[0]) == (1, "one:True")
    assert await jobs.spend() == await jobs.ledger()


async def test_a_handler_that_kills_its_process_is_found_alone_and_quarantined(
    headrace: Headrace, jobs: Jobs, provider: SimulatedProvider, environment_of_app: dict[str, str]
) -> None:
    job = await headrace.enqueue("deadly", Document())
    for _ in range(2):
        async with worker(environment=environment_of_app) as process:
            assert await process.wait() == 7
    async with worker(environment=environment_of_app):
        (ending,) = await jobs.ended([job.id], within=PATIENCE)
    assert (ending.job.state, ending.job.error_class) == (JobState.FAILED, ErrorClass.QUARANTINED)
    assert "exit code 7" in (ending.job.error or "")


async def test_a_handler_that_will_not_stop_does_not_hold_up_its_worker(
    headrace: Headrace, jobs: Jobs, provider: SimulatedProvider, environment_of_app: dict[str, str]
) -> None:
    job = await headrace.enqueue("stubborn", Document())
    async with worker(environment=environment_of_app, drain_seconds=0) as process:
        await jobs.until(job.id, lambda row: row["progress"] is not None)
        process.send_signal(signal.SIGTERM)
        await gone(process.pid)
        assert await process.wait() == 0
    row = await jobs.row(job.id)
    assert (row["state"], row["waiting_for"], row["attempts"]) == ("queued", "shutdown", 0)


async def test_the_example_runs(
    headrace: Headrace, provider: SimulatedProvider, environment_of_app: dict[str, str]
) -> None:
    app = {"PYTHONPATH": str(EXAMPLES), "HEADRACE_HANDLERS": "handlers"}
    async with worker(environment=app):
        job = await headrace.enqueue("summarise", {"text": "A mill stands by the river. " * 400})
        result = await job.result(timeout=PATIENCE)
    assert result.body["parts"] == 3
    assert provider.books.total.answered == 4


async def test_a_lane_that_is_not_there_is_one_sentence(
    environment: None, provider: SimulatedProvider, capsys: pytest.CaptureFixture[str]
) -> None:
    code = await asyncio.to_thread(cli.run, ["worker", "--lanes", "default,btch", "--burst"])
    assert code == 2
    assert capsys.readouterr().err == (
        "headrace: lanes: btch: there is no such lane, only interactive, default, batch.\n"
    )


async def test_a_module_that_is_not_there_is_one_sentence(
    environment: None, provider: SimulatedProvider, capsys: pytest.CaptureFixture[str]
) -> None:
    code = await asyncio.to_thread(cli.run, ["worker", "--handlers", "no_such_module"])
    assert code == 2
    assert capsys.readouterr().err == "headrace: no_such_module: there is no module no_such_module.\n"
