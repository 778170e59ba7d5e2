"""A redelivered handler finds what it was answered and what it had finished, and pays for neither again."""

import asyncio
from collections.abc import Awaitable
from datetime import timedelta

import pytest
from handler_stage import CHAT, QUICK, Application, Document, Summary, question
from pydantic import BaseModel

from headrace_producer import Headrace
from headrace_shared.budgets import Budgets, Held, HoldRequest
from headrace_shared.dispatch.dispatch import Dispatch
from headrace_shared.errors import CallFailed
from headrace_shared.ids import CallNumber, JobId, WorkerId, hold_id
from headrace_shared.job import JobState
from headrace_shared.money import NanoUSD
from headrace_shared.outcome import ErrorClass, Succeeded, WaitReason
from headrace_shared.request import check_request
from headrace_shared.store import checkpoints, claims, lost, runs
from headrace_shared.store.money import BudgetPolicy, WindowKind
from headrace_shared.store.pool import Pool
from headrace_shared.testing.clock import Clock
from headrace_shared.testing.jobs import Jobs, eventually
from headrace_shared.testing.scripted_provider import ScriptedProvider, completion, refusal
from headrace_workers import Context, handler
from headrace_workers.handlers.answers import Answer
from headrace_workers.testing import running_worker

pytestmark = pytest.mark.usefixtures("environment")

PATIENCE = timedelta(seconds=30)
LEASE = timedelta(seconds=600)
"""Longer than a test: no heartbeat comes between."""


@pytest.fixture
def jobs(pool: Pool, dispatch: Dispatch) -> Jobs:
    return Jobs(pool, dispatch)


@pytest.fixture
def application(monkeypatch: pytest.MonkeyPatch) -> Application:
    return Application(monkeypatch)


async def lose(jobs: Jobs, clock: Clock, job_id: JobId) -> None:
    """Take the row from its run, as the reaper does when a worker stood still for too long."""

    async def crashes() -> int:
        # Locked, so that one is seen that the worker's own reaper counts: one more takes the next run's row.
        row = await jobs.pool.fetchrow("SELECT crashes FROM headrace.jobs WHERE id = $1 FOR SHARE", job_id)
        assert row is not None
        return int(row["crashes"])

    before = await crashes()
    # The worker's own heartbeat may come in between.
    while await crashes() == before:
        await clock.advance(2 * LEASE)
        await lost.reap(jobs.pool)


class Stop:
    """Where a handler waits in its first run, until that is over."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()

    async def __call__(self, ctx: Context) -> None:
        if ctx.run == 1:
            self.reached.set()
            await asyncio.Event().wait()


async def test_a_run_that_was_cut_off_pays_nothing_twice(
    headrace: Headrace, jobs: Jobs, scripted: ScriptedProvider, application: Application
) -> None:
    scripted.script(completion("one"), completion("two"), completion("never"))
    stop = Stop()
    replayed: list[bool] = []

    @handler("two")
    async def two(ctx: Context, _document: Document) -> Summary:
        first = await ctx.llm(CHAT, question("1"))
        await stop(ctx)
        second = await ctx.llm(CHAT, question("2"))
        replayed.extend((first.replayed, second.replayed))
        assert (first.model, first.body["object"]) == ("gpt-4o-mini", "chat.completion")
        return Summary(text=f"{first.text} {second.text}")

    job = await headrace.enqueue("two", Document())
    handlers = application.with_handlers(two)
    async with running_worker(handlers=handlers, drain_seconds=0):
        await stop.reached.wait()
    assert (await jobs.row(job.id))["waiting_for"] == WaitReason.SHUTDOWN
    async with running_worker(handlers=handlers):
        result = await job.result(timeout=PATIENCE)
    assert result.parse(Summary).text == "one two"
    assert replayed == [True, False]
    assert len(scripted.requests) == 2
    assert [(row["run"], row["call"]) for row in await jobs.calls(job.id)] == [(1, 1), (2, 1)]
    assert result.attempts == 1
    assert result.usage.prompt_tokens == 18
    assert await jobs.spend() == await jobs.ledger()


async def test_a_run_that_lost_its_row_is_told_apart_from_the_next(
    headrace: Headrace, jobs: Jobs, scripted: ScriptedProvider, application: Application, clock: Clock
) -> None:
    stop = Stop()
    late = asyncio.Event()

    @handler("stale")
    async def stale(ctx: Context, _document: Document) -> Summary:
        answer = await ctx.llm(CHAT, question())
        try:
            await stop(ctx)
        except asyncio.CancelledError:
            # What a run does that does not know that it is over.
            for what in (ctx.step("late", write), ctx.llm(CHAT, question("late")), ctx.progress(1)):
                with pytest.raises(BaseException, match=r"^$"):
                    await what
            late.set()
            raise
        return Summary(text=answer.text)

    async def write() -> str:
        raise NotImplementedError

    job = await headrace.enqueue("stale", Document())
    async with running_worker(handlers=application.with_handlers(stale)):
        await stop.reached.wait()
        await lose(jobs, clock, job.id)
        result = await job.result(timeout=PATIENCE)
        await late.wait()
    assert result.parse(Summary).text == "Hello"
    assert len(scripted.requests) == 1
    row = await jobs.row(job.id)
    assert (row["result_run"], row["crashes"], row["progress"]) == (2, 1, None)


class Page(BaseModel):
    url: str
    size: int


async def test_a_step_is_done_once_and_comes_back_as_what_it_was(
    headrace: Headrace, jobs: Jobs, scripted: ScriptedProvider, application: Application
) -> None:
    stop = Stop()
    done: list[str] = []
    seen: list[object] = []

    async def fetch(url: str, *, size: int) -> Page:
        done.append(url)
        return Page(url=url, size=size)

    async def count() -> tuple[int, str]:
        done.append("pair")
        return 1, "\0 a"

    def pair() -> Awaitable[tuple[int, str]]:
        return count()

    @handler("steps")
    async def steps(ctx: Context, _document: Document) -> Summary:
        page = await ctx.step("fetch", fetch, "https://example.com", size=3)
        plain = await ctx.step("pair", pair)
        seen.extend((page, plain))
        await stop(ctx)
        return Summary(text=page.url)

    job = await headrace.enqueue("steps", Document())
    handlers = application.with_handlers(steps)
    async with running_worker(handlers=handlers, drain_seconds=0):
        await stop.reached.wait()
    async with running_worker(handlers=handlers):
        await job.result(timeout=PATIENCE)
    assert done == ["https://example.com", "pair"]
    assert seen == [Page(url="https://example.com", size=3), [1, "\0 a"]] * 2
    rows = await jobs.pool.fetch("SELECT name, run FROM headrace.checkpoints WHERE job_id = $1", job.id)
    assert {(row["name"], row["run"]) for row in rows} == {("fetch", 1), ("pair", 1), ("", 2)}


FROZEN = WorkerId("frozen")


async def freeze_in_a_call(headrace: Headrace, jobs: Jobs, budgets: Budgets) -> runs.Conclusion:
    """Leave the hold and the intent of a job's one call, as a worker does that freezes in it.

    Returns what that worker writes down when it goes on.
    """
    able = claims.Abilities(endpoints=("handler:late",))
    handle = await headrace.enqueue("late", Document())
    (job,) = (await claims.claim_jobs(jobs.pool, [handle.id], FROZEN, LEASE, abilities=able)).jobs
    call, scopes, amount = CallNumber(1), ("global", "tenant:default"), NanoUSD(10**6)
    (held,) = await budgets.hold([HoldRequest(hold_id(job.id, job.run, call), amount, scopes)])
    assert isinstance(held, Held)
    model, digest = "gpt-4o-mini", check_request(CHAT, question(), max_body_bytes=10**6).digest
    intent = runs.Intent(
        job.id, job.run, call, "openai", model, held.id, amount, held.at, scopes, "test", CHAT, "only", digest
    )
    assert await runs.open_calls(jobs.pool, held.epoch, [intent])
    answer = completion().body
    return runs.Conclusion(job.id, job.run, call, "answered", timedelta(0), status=200, answer=answer)


async def test_a_late_answer_is_found_by_the_run_that_was_about_to_ask_again(
    headrace: Headrace,
    jobs: Jobs,
    scripted: ScriptedProvider,
    application: Application,
    budgets: Budgets,
    *,
    clock: Clock,
) -> None:
    runs_begun: list[int] = []
    second, ask_again = asyncio.Event(), asyncio.Event()

    @handler("late")
    async def late(ctx: Context, _document: Document) -> Summary:
        runs_begun.append(ctx.run)
        if ctx.run == 2:
            second.set()
            await ask_again.wait()
        answer = await ctx.llm(CHAT, question(), name="only")
        return Summary(text=f"{answer.text} {answer.replayed}")

    late_answer = await freeze_in_a_call(headrace, jobs, budgets)
    await clock.advance(2 * LEASE)
    async with running_worker(handlers=application.with_handlers(late), lease_seconds=LEASE.total_seconds()):
        await second.wait()
        await runs.finish(jobs.pool, FROZEN, 1, conclusions=[late_answer], attempts=[], ends=[])
        ask_again.set()
        result = await headrace.result(late_answer.job_id, timeout=PATIENCE)
    assert result.parse(Summary).text == "Hello True"
    assert runs_begun == [2, 3]
    assert scripted.requests == []
    assert [(row["run"], row["state"]) for row in await jobs.calls(late_answer.job_id)] == [(1, "answered")]
    assert await jobs.spend() == await jobs.ledger()


async def test_calls_beside_one_that_must_wait_are_waited_for_and_kept(
    headrace: Headrace,
    jobs: Jobs,
    scripted: ScriptedProvider,
    application: Application,
    clock: Clock,
    *,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held_up: list[str] = []

    @handler("group")
    async def group(ctx: Context, _document: Document) -> Summary:
        try:
            async with asyncio.TaskGroup() as tasks:
                slow = tasks.create_task(ctx.llm(CHAT, question(model="slow")))
                if ctx.run == 1:
                    await other.arrived(1)
                limited = tasks.create_task(ctx.llm(CHAT, question()))
        except Exception as error:
            held_up.append(repr(error))
            raise
        return Summary(text=f"{slow.result().replayed} {limited.result().replayed}")

    async with ScriptedProvider([completion()]) as other:
        monkeypatch.setenv("OTHER_API_KEY", "sk-other")
        target = {"provider": "other", "model": "gpt-4o-mini"}
        await jobs.configure(
            {
                "providers": {"other": {"base_url": other.url, "priced_as": "openai"}},
                "routes": {"slow": {"targets": [target]}},
            }
        )
        other.open.clear()
        scripted.script(refusal(429, "Later.", headers={"retry-after": "60"}), completion())
        job = await headrace.enqueue("group", Document())
        handlers = application.with_handlers(group)
        async with running_worker(handlers=handlers, lease_seconds=LEASE.total_seconds()):
            # The one is put off now, and the other is still to be answered.
            await eventually(
                lambda: jobs.calls(job.id), lambda calls: "failed" in {call["state"] for call in calls}
            )
            other.open.set()
            row = await jobs.until(job.id, lambda row: row["waiting_for"] == WaitReason.RETRY)
            assert (row["attempts"], row["error_class"]) == (1, ErrorClass.RATE_LIMITED)
        assert {row["state"] for row in await jobs.calls(job.id)} == {"answered", "failed"}
        await clock.advance(timedelta(seconds=62))
        async with running_worker(handlers=handlers):
            result = await job.result(timeout=PATIENCE)
        assert (result.parse(Summary).text, result.attempts) == ("True False", 2)
        assert (len(other.requests), len(scripted.requests)) == (1, 2)
    assert held_up == []


class Charge:
    """A step that must not be done twice, and is slow."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.go_on = asyncio.Event()
        self.times = 0

    async def __call__(self) -> str:
        self.times += 1
        self.begun.set()
        await self.go_on.wait()
        return "charged"


@pytest.mark.parametrize("how", ["gather", "group", "nested"])
async def test_a_step_beside_a_call_that_must_wait_is_waited_for_and_kept(
    headrace: Headrace,
    jobs: Jobs,
    scripted: ScriptedProvider,
    application: Application,
    clock: Clock,
    *,
    how: str,
) -> None:
    charge = Charge()

    @handler("charging")
    async def charging(ctx: Context, _document: Document) -> Summary:
        async def ask() -> str:
            await charge.begun.wait()
            return (await ctx.llm(CHAT, question())).text

        other = ctx.step("ask", ask) if how == "nested" else ask()
        if how != "group":
            done, text = await asyncio.gather(ctx.step("charge", charge), other)
            return Summary(text=f"{done} {text}")
        async with asyncio.TaskGroup() as tasks:
            charged, asked = tasks.create_task(ctx.step("charge", charge)), tasks.create_task(other)
        return Summary(text=f"{charged.result()} {asked.result()}")

    scripted.script(refusal(429, "Later.", headers={"retry-after": "60"}), completion())
    job = await headrace.enqueue("charging", Document())
    handlers = application.with_handlers(charging)
    async with running_worker(handlers=handlers, lease_seconds=LEASE.total_seconds()):
        await eventually(
            lambda: jobs.calls(job.id), lambda calls: "failed" in {call["state"] for call in calls}
        )
        # The call is put off, and all that its run still waits for is the step.
        asyncio.get_running_loop().call_later(0.2, charge.go_on.set)
        await jobs.until(job.id, lambda row: row["waiting_for"] == WaitReason.RETRY)
        await clock.advance(timedelta(seconds=62))
        result = await job.result(timeout=PATIENCE)
    assert result.parse(Summary).text == "charged Hello"
    assert charge.times == 1


async def test_a_step_that_a_handler_left_behind_when_it_failed_is_not_done_again(
    headrace: Headrace, jobs: Jobs, scripted: ScriptedProvider, application: Application
) -> None:
    charge = Charge()

    @handler("failing")
    async def failing(ctx: Context, _document: Document) -> Summary:
        async def fail() -> None:
            await charge.begun.wait()
            if ctx.run == 1:
                asyncio.get_running_loop().call_later(0.2, charge.go_on.set)
                raise ValueError

        done, _ = await asyncio.gather(ctx.step("charge", charge), fail())
        return Summary(text=done)

    await jobs.configure(QUICK)
    job = await headrace.enqueue("failing", Document())
    async with running_worker(handlers=application.with_handlers(failing)):
        result = await job.result(timeout=PATIENCE)
    assert (result.parse(Summary).text, result.attempts, charge.times) == ("charged", 2, 1)


@pytest.mark.parametrize("how", ["refused", "broken off"])
async def test_the_answer_to_a_call_that_was_repeated_is_not_paid_twice(
    headrace: Headrace, jobs: Jobs, scripted: ScriptedProvider, application: Application, how: str
) -> None:
    stop = Stop()
    replayed: list[bool] = []

    async def ask_in_vain(ctx: Context) -> Answer | None:
        """Return the answer if there is one."""
        asking = asyncio.ensure_future(ctx.llm(CHAT, question()))
        if how == "broken off" and ctx.run == 1:
            await scripted.arrived(1)
            asking.cancel()
            scripted.open.set()
        try:
            return await asking
        except (CallFailed, asyncio.CancelledError):
            return None

    @handler("repeating")
    async def repeating(ctx: Context, _document: Document) -> Summary:
        answer = await ask_in_vain(ctx) or await ctx.llm(CHAT, question())
        await stop(ctx)
        replayed.append(answer.replayed)
        # One more than there was before: it is asked, under a name that no answer has.
        replayed.append((await ctx.llm(CHAT, question())).replayed)
        return Summary(text=answer.text)

    if how == "refused":
        scripted.script(refusal(400, "No."), completion())
    else:
        scripted.open.clear()
    job = await headrace.enqueue("repeating", Document())
    handlers = application.with_handlers(repeating)
    async with running_worker(handlers=handlers, drain_seconds=0):
        await stop.reached.wait()
    assert len(scripted.requests) == 2
    async with running_worker(handlers=handlers):
        await job.result(timeout=PATIENCE)
    assert (replayed, len(scripted.requests)) == ([True, False], 3)
    assert await jobs.spend() == await jobs.ledger()


async def test_calls_are_known_again_in_another_order_and_by_what_they_ask(
    headrace: Headrace, jobs: Jobs, scripted: ScriptedProvider, application: Application
) -> None:
    stop = Stop()
    replayed: list[bool] = []

    @handler("order")
    async def order(ctx: Context, _document: Document) -> Summary:
        texts = ["a", "b", "b"] if ctx.run == 1 else ["b", "b", "a", "b"]
        answers = [await ctx.llm(CHAT, question(text)) for text in texts]
        named = await ctx.llm(CHAT, question(f"of run {min(ctx.run, 2)}"), name="mine")
        await stop(ctx)
        replayed.extend(answer.replayed for answer in [*answers, named])
        return Summary(text="")

    job = await headrace.enqueue("order", Document())
    handlers = application.with_handlers(order)
    async with running_worker(handlers=handlers, drain_seconds=0):
        await stop.reached.wait()
    async with running_worker(handlers=handlers):
        await job.result(timeout=PATIENCE)
    assert replayed == [True, True, True, False, False]
    assert len(scripted.requests) == 6


async def test_a_short_wait_is_waited_for_and_counts_for_the_call_alone(
    headrace: Headrace, jobs: Jobs, scripted: ScriptedProvider, application: Application
) -> None:
    begun: list[int] = []

    @handler("bumpy")
    async def bumpy(ctx: Context, _document: Document) -> Summary:
        begun.append(ctx.run)
        first = await ctx.llm(CHAT, question("1"))
        await ctx.llm(CHAT, question("2"))
        return Summary(text=first.text)

    failure = refusal(500, "No.")
    scripted.script(failure, failure, completion(), failure, failure, completion())
    await jobs.configure(QUICK)
    job = await headrace.enqueue("bumpy", Document(), max_attempts=3)
    async with running_worker(handlers=application.with_handlers(bumpy)):
        result = await job.result(timeout=PATIENCE)
    assert (begun, result.attempts) == ([1], 1)
    assert [(row["call"], row["state"]) for row in await jobs.calls(job.id)] == [
        (1, "failed"),
        (2, "failed"),
        (3, "answered"),
        (4, "failed"),
        (5, "failed"),
        (6, "answered"),
    ]
    assert await jobs.spend() == await jobs.ledger()


async def test_a_handler_waits_for_its_budget_and_goes_on_where_it_was(
    headrace: Headrace, jobs: Jobs, scripted: ScriptedProvider, application: Application, budgets: Budgets
) -> None:
    @handler("dear")
    async def dear(ctx: Context, _document: Document) -> Summary:
        first = await ctx.llm(CHAT, question("1"))
        second = await ctx.llm(CHAT, question("2"))
        return Summary(text=f"{first.replayed} {second.replayed}")

    # Enough for one call at its worst, and not for what another one can cost beside its bill.
    scripted.script(completion(completion_tokens=1000))
    await budgets.set("tenant:default", WindowKind.DAY, NanoUSD(700_000), BudgetPolicy.WAIT)
    job = await headrace.enqueue("dear", Document())
    async with running_worker(handlers=application.with_handlers(dear)):
        row = await jobs.until(job.id, lambda row: row["waiting_for"] == WaitReason.BUDGET)
        assert (row["state"], row["attempts"]) == (JobState.QUEUED, 0)
        assert len(scripted.requests) == 1
        await budgets.set("tenant:default", WindowKind.DAY, NanoUSD(7_000_000), BudgetPolicy.WAIT)
        result = await job.result(timeout=PATIENCE)
    assert result.parse(Summary).text == "True False"
    assert len(scripted.requests) == 2
    assert await jobs.spend() == await jobs.ledger()


async def test_calls_at_the_same_time_share_what_their_job_may_cost(
    headrace: Headrace, jobs: Jobs, scripted: ScriptedProvider, application: Application
) -> None:
    """There is the money of one at its worst, and of what another one really costs."""

    @handler("both")
    async def both(ctx: Context, _document: Document) -> Summary:
        answers = await asyncio.gather(*(ctx.llm(CHAT, question(number)) for number in "12"))
        return Summary(text=" ".join(answer.text for answer in answers))

    job = await headrace.enqueue("both", Document(), max_cost="0.0007")
    async with running_worker(handlers=application.with_handlers(both)):
        result = await job.result(timeout=PATIENCE)
    assert result.parse(Summary).text == "Hello Hello"
    calls = sorted((await jobs.calls(job.id)), key=lambda call: call["opened_at"])
    assert [call["state"] for call in calls] == ["answered", "answered"]
    assert calls[0]["ended_at"] <= calls[1]["opened_at"]
    assert len(scripted.requests) == 2


async def test_what_a_lost_run_writes_is_not_kept(
    headrace: Headrace, jobs: Jobs, pool: Pool, clock: Clock
) -> None:
    job = await headrace.enqueue("two", Document())
    able = claims.Abilities(("handler:two",))
    (lost,) = (await claims.claim_jobs(pool, [job.id], WorkerId("w"), LEASE, abilities=able)).jobs
    assert await checkpoints.keep(pool, job.id, lost.run, "done", b"1")
    await lose(jobs, clock, job.id)
    assert not await checkpoints.keep(pool, job.id, lost.run, "queued", b"1")
    (present,) = (await claims.claim_jobs(pool, [job.id], WorkerId("w"), LEASE, abilities=able)).jobs
    assert not await checkpoints.keep(pool, job.id, lost.run, "stale", b"1")
    await checkpoints.tell(pool, job.id, lost.run, 1, "stale")
    end = runs.RunEnd(job.id, lost.run, Succeeded(), 0, (lost.run, None), b'"stale"')
    finished = await runs.finish(pool, WorkerId("w"), 1, conclusions=[], attempts=[], ends=[end])
    assert finished.states == {}
    assert (await checkpoints.recall(pool, job.id, present.run)).steps == {"done": b"1"}
    assert (await job.get()).progress is None
    # The answer to such a statement may be lost on its way: it is made again.
    for _ in range(2):
        assert await checkpoints.keep(pool, job.id, present.run, "mine", b"2")
    end = runs.RunEnd(job.id, present.run, Succeeded(), 0, (present.run, None), b'{"text":"x"}')
    await runs.finish(pool, WorkerId("w"), 1, conclusions=[], attempts=[], ends=[end])
    assert (await job.result(timeout=PATIENCE)).parse(Summary) == Summary(text="x")
