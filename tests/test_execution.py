"""What a run comes to: each way a call can end, written down as state, attempts, ledger and money."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta

import pytest

from headrace_shared.dispatch.dispatch import Dispatch
from headrace_shared.ids import CallNumber
from headrace_shared.ids import Run as RunNumber
from headrace_shared.job import JobState
from headrace_shared.outcome import ErrorClass, Failed, Failure, Outcome, Snoozed, Succeeded, WaitReason
from headrace_shared.request import Endpoint
from headrace_shared.store.pool import Pool
from headrace_shared.testing.behaviour import Behaviour
from headrace_shared.testing.clock import Clock
from headrace_shared.testing.jobs import MODEL, Jobs, claimed_job
from headrace_shared.testing.scripted_provider import Scripted, ScriptedProvider, completion, refusal
from headrace_shared.testing.simulated_provider import SimulatedProvider
from headrace_workers.execution import Again, Execution, Run
from headrace_workers.running import Running
from headrace_workers.telemetry import Metrics
from headrace_workers.testing import running_worker

pytestmark = pytest.mark.usefixtures("environment")

QUICK: Mapping[str, object] = {"retries": {"initial": "10ms", "maximum": "20ms"}}
PRICE = {"input": "1.00", "output": "2.00"}


@pytest.fixture
def jobs(pool: Pool, dispatch: Dispatch) -> Jobs:
    return Jobs(pool, dispatch)


@dataclass(frozen=True, slots=True)
class Case:
    behaviour: Behaviour
    error: ErrorClass
    call: str
    model: str = MODEL
    attempts: int = 2
    in_suspense: bool = False
    billed: bool = False
    body: Mapping[str, object] | None = None


CASES = {
    "429": Case(Behaviour(rate_limited=1), ErrorClass.RATE_LIMITED, "failed"),
    "500": Case(Behaviour(server_error=1), ErrorClass.TRANSIENT, "failed"),
    "503": Case(Behaviour(outage=True), ErrorClass.TRANSIENT, "failed"),
    "400": Case(
        Behaviour(),
        ErrorClass.BAD_REQUEST,
        "failed",
        attempts=1,
        body={"messages": []},
    ),
    "404": Case(Behaviour(), ErrorClass.BAD_REQUEST, "failed", model="missing-1", attempts=1),
    "quota": Case(Behaviour(), ErrorClass.QUOTA_EXHAUSTED, "failed", model="quota-1", attempts=1),
    "prompt refused": Case(Behaviour(), ErrorClass.CONTENT_FILTER, "failed", model="refused-1", attempts=1),
    "answer filtered": Case(
        Behaviour(), ErrorClass.CONTENT_FILTER, "answered", model="filtered-1", attempts=1, billed=True
    ),
    "garbage": Case(Behaviour(garbage=1), ErrorClass.UNREADABLE, "suspense", in_suspense=True),
    "cut": Case(Behaviour(cut=1), ErrorClass.TRANSIENT, "suspense", in_suspense=True),
    "hang": Case(Behaviour(hang=1), ErrorClass.TIMEOUT, "suspense", in_suspense=True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
async def test_each_kind_of_error_is_written_down(
    jobs: Jobs, provider: SimulatedProvider, case: Case
) -> None:
    provider.behave(case.behaviour)
    prices = {f"openai/{model}": PRICE for model in ("missing-1", "quota-1", "refused-1", "filtered-1")}
    slow = {"openai": {"total_timeout": "300ms", "read_timeout": "200ms"}}
    await jobs.configure({**QUICK, "prices": prices, "providers": slow})
    (job_id,) = await jobs.add(model=case.model, max_attempts=2, body=case.body)
    async with running_worker():
        (ending,) = await jobs.ended([job_id])
    assert (ending.job.state, ending.job.error_class) == (JobState.FAILED, case.error)
    assert ending.job.attempts == case.attempts
    calls, attempts = await jobs.calls(job_id), await jobs.attempts(job_id)
    assert [call["state"] for call in calls] == [case.call] * case.attempts
    assert {call["error_class"] for call in calls} == {case.error}
    assert [attempt["number"] for attempt in attempts] == list(range(1, case.attempts + 1))
    assert [attempt["outcome"] for attempt in attempts][-1] == "failed"
    assert {attempt["error_class"] for attempt in attempts} == {case.error}
    assert all(attempt["error"] for attempt in attempts)
    assert all((call["suspense_nano"] == call["held_nano"]) == case.in_suspense for call in calls)
    assert all((call["cost_nano"] > 0) == case.billed for call in calls)
    assert await jobs.spend() == await jobs.ledger()


async def test_a_key_that_is_refused_fails_at_once(
    jobs: Jobs, provider: SimulatedProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with ScriptedProvider([refusal(401, "Incorrect API key provided.")]) as scripted:
        monkeypatch.setenv("OPENAI_BASE_URL", scripted.url)
        (job_id,) = await jobs.add()
        async with running_worker():
            (ending,) = await jobs.ended([job_id])
    assert (ending.job.error_class, ending.job.attempts) == (ErrorClass.AUTH, 1)
    assert "Incorrect API key" in (ending.job.error or "")


async def test_a_short_retry_keeps_its_slot(jobs: Jobs, scripted: ScriptedProvider) -> None:
    scripted.script(refusal(500, "Once."), completion())
    await jobs.configure(QUICK)
    (job_id,) = await jobs.add()
    async with running_worker():
        (ending,) = await jobs.ended([job_id])
    assert (ending.job.state, ending.job.run, ending.job.attempts) == (JobState.SUCCEEDED, 1, 1)
    assert [(call["run"], call["call"]) for call in await jobs.calls(job_id)] == [(1, 1), (1, 2)]
    assert ending.answer is not None
    assert (ending.answer.run, ending.answer.call) == (1, 2)
    outcomes = [(one["number"], one["outcome"]) for one in await jobs.attempts(job_id)]
    assert outcomes == [(1, "retried"), (2, "succeeded")]
    assert await jobs.spend() == await jobs.ledger()


async def test_a_long_retry_is_put_back(jobs: Jobs, scripted: ScriptedProvider, clock: Clock) -> None:
    scripted.script(refusal(429, "Later.", headers={"retry-after": "60"}), completion())
    (job_id,) = await jobs.add()
    async with running_worker(lease_seconds=600):
        row = await jobs.until(job_id, lambda row: row["waiting_for"] == WaitReason.RETRY)
        wait = row["run_at"] - row["started_at"]
        assert timedelta(seconds=60) <= wait <= timedelta(seconds=62)
        assert (row["state"], row["run"], row["worker"]) == (JobState.QUEUED, 1, None)
    # The worker has put the id back into its queue as well, by the time it has stopped.
    await clock.advance(timedelta(seconds=62))
    async with running_worker(lease_seconds=600):
        (ending,) = await jobs.ended([job_id])
    assert (ending.job.state, ending.job.run, ending.job.attempts) == (JobState.SUCCEEDED, 2, 1)
    assert [(call["run"], call["call"]) for call in await jobs.calls(job_id)] == [(1, 1), (2, 1)]


async def test_the_sixth_failure_is_the_last_and_gives_its_own_reason(
    jobs: Jobs, scripted: ScriptedProvider
) -> None:
    scripted.script(*[refusal(500, f"Failure {number}.") for number in range(1, 9)])
    await jobs.configure(QUICK)
    (job_id,) = await jobs.add()
    async with running_worker():
        (ending,) = await jobs.ended([job_id])
    assert len(scripted.requests) == 6
    assert (ending.job.state, ending.job.attempts) == (JobState.FAILED, 6)
    assert "Failure 6." in (ending.job.error or "")
    reasons = [one["error"] for one in await jobs.attempts(job_id)]
    assert [reason[-2] for reason in reasons] == list("123456")


async def test_what_has_no_price_is_never_called(jobs: Jobs, provider: SimulatedProvider) -> None:
    (job_id,) = await jobs.add(model="nobody-knows-this")
    async with running_worker():
        (ending,) = await jobs.ended([job_id])
    assert (ending.job.state, ending.job.error_class) == (JobState.FAILED, ErrorClass.UNKNOWN_PRICE)
    assert await jobs.calls(job_id) == []
    assert provider.books.total.requests == 0


async def test_what_has_no_route_any_more_fails(jobs: Jobs, provider: SimulatedProvider) -> None:
    (job_id,) = await jobs.add()
    await jobs.configure({"defaults": {"any_model": False}})
    async with running_worker():
        (ending,) = await jobs.ended([job_id])
    assert (ending.job.state, ending.job.error_class) == (JobState.FAILED, ErrorClass.NO_ROUTE)
    assert provider.books.total.requests == 0


async def test_a_provider_without_a_key_is_never_called_and_costs_nothing(
    jobs: Jobs, provider: SimulatedProvider
) -> None:
    target = {"provider": "other", "model": MODEL}
    await jobs.configure(
        {
            **QUICK,
            "providers": {"other": {"base_url": provider.url, "priced_as": "openai"}},
            "routes": {"mine": {"targets": [target]}},
        }
    )
    (job_id,) = await jobs.add(model="mine")
    async with running_worker():
        (ending,) = await jobs.ended([job_id])
    assert (ending.job.error_class, ending.job.attempts) == (ErrorClass.AUTH, 1)
    assert "OTHER_API_KEY" in (ending.job.error or "")
    assert ending.bill.suspense == 0


NASTY = "\0 and \ud800 " + "x" * 2_000_000


@pytest.mark.parametrize(
    ("answer", "endpoint", "error"),
    [
        (refusal(400, NASTY), Endpoint.CHAT_COMPLETIONS, ErrorClass.BAD_REQUEST),
        (Scripted(400, b"\xff\0" * 1000), Endpoint.CHAT_COMPLETIONS, ErrorClass.BAD_REQUEST),
        (
            Scripted(
                body=b'{"status":"failed","error":{"code":"server_error","message":"a\\u0000b\\ud800c"},'
                b'"usage":{"input_tokens":5,"output_tokens":1,"total_tokens":6}}'
            ),
            Endpoint.RESPONSES,
            ErrorClass.TRANSIENT,
        ),
    ],
    ids=["message", "body", "failed response"],
)
async def test_a_nasty_reason_is_still_a_reason(
    jobs: Jobs, scripted: ScriptedProvider, answer: Scripted, endpoint: Endpoint, error: ErrorClass
) -> None:
    scripted.script(answer)
    (job_id,) = await jobs.add(endpoint=endpoint, body={"input": "Hi"}, max_attempts=1)
    async with running_worker():
        (ending,) = await jobs.ended([job_id])
    assert (ending.job.state, ending.job.error_class) == (JobState.FAILED, error)
    assert len(ending.job.error or "") < 600
    (call,) = await jobs.calls(job_id)
    assert call["answer"] == answer.body[: 64 * 1024]


async def test_an_answer_is_kept_byte_for_byte(jobs: Jobs, scripted: ScriptedProvider) -> None:
    odd = (
        b'\r\n {"choices" :[ {"finish_reason":"stop","index":0,\t"message":{"role":"assistant",'
        b'"content":"\\u0000 \\ud83d\\ude00 \\u00e9 \xc3\xa9 \\/"}}],"unknown":1e400,\n'
        b'"usage":{"prompt_tokens":9,"completion_tokens":3,"total_tokens":12}}  \n'
    )
    scripted.script(Scripted(body=odd))
    (job_id,) = await jobs.add()
    async with running_worker():
        (ending,) = await jobs.ended([job_id])
    assert ending.job.state is JobState.SUCCEEDED
    assert ending.answer is not None
    assert ending.answer.body == odd
    assert ending.bill.usage.prompt_tokens == 9


async def test_many_jobs_at_once_cost_what_the_provider_says(jobs: Jobs, provider: SimulatedProvider) -> None:
    ids = await jobs.add(150)
    async with running_worker(concurrency=32):
        endings = await jobs.ended(ids)
    books = provider.books.total
    assert {ending.job.state for ending in endings} == {JobState.SUCCEEDED}
    assert books.requests == 150
    assert sum(ending.bill.usage.prompt_tokens for ending in endings) == books.prompt_tokens
    assert sum(ending.bill.usage.completion_tokens for ending in endings) == books.completion_tokens
    assert await jobs.spend() == await jobs.ledger()


# The steps by themselves.


class Steps:
    """Three steps that note that they were there; the second does as it is told."""

    def __init__(self, second: Outcome | Exception | asyncio.Event | None = None) -> None:
        self.passed: list[str] = []
        self.settled: list[Run] = []
        self.reached = asyncio.Event()
        self.waiting = asyncio.Event()
        self._second = second

    def execution(self, *, again: int = 0) -> Execution:
        async def settle(run: Run) -> Again | Outcome:
            self.settled.append(run)
            if len(self.settled) <= again and run.outcome is None:
                # Later than whatever this turn of the loop still does: the run sleeps by then.
                asyncio.get_running_loop().call_later(0.01, self.waiting.set)
                return Again(run.again(run.attempts + 1), timedelta(seconds=60))
            return run.outcome or Succeeded()

        return Execution((self.first, self.second, self.third), settle)

    async def first(self, run: Run) -> Run:
        self.passed.append("first")
        return run

    async def second(self, run: Run) -> Run:
        self.passed.append("second")
        self.reached.set()
        match self._second:
            case None:
                return run
            case Exception() as error:
                raise error
            case asyncio.Event() as event:
                await event.wait()
                return run
            case outcome:
                return run.ended(outcome)

    async def third(self, run: Run) -> Run:
        self.passed.append("third")
        return run


async def test_a_run_passes_all_steps_in_order() -> None:
    steps = Steps()
    assert await steps.execution().run(claimed_job()) == Succeeded()
    assert steps.passed == ["first", "second", "third"]


async def test_an_outcome_passes_by_the_later_steps_and_is_settled() -> None:
    outcome = Snoozed(timedelta(seconds=1), WaitReason.BUDGET)
    steps = Steps(outcome)
    assert await steps.execution().run(claimed_job()) == outcome
    assert steps.passed == ["first", "second"]
    assert [run.outcome for run in steps.settled] == [outcome]


async def test_a_step_that_breaks_fails_the_run_for_an_internal_reason() -> None:
    steps = Steps(ValueError("secret"))
    outcome = await steps.execution().run(claimed_job())
    assert outcome == Failed(Failure(ErrorClass.INTERNAL, "ValueError"))
    assert steps.passed == ["first", "second"]


async def test_an_interrupted_step_ends_the_run_for_the_first_reason_given() -> None:
    steps, job = Steps(asyncio.Event()), claimed_job()
    execution = steps.execution()
    task = asyncio.create_task(execution.run(job))
    await steps.reached.wait()
    execution.interrupt(job, WaitReason.SHUTDOWN, task)
    execution.interrupt(job, ErrorClass.CANCELLED, task)
    assert await task == Snoozed(timedelta(0), WaitReason.SHUTDOWN)
    assert not steps.settled[0].sent


async def test_a_run_that_is_interrupted_before_it_began_is_settled_all_the_same() -> None:
    steps, job = Steps(), claimed_job()
    execution = steps.execution()
    task = asyncio.create_task(execution.run(job))
    execution.interrupt(job, WaitReason.SHUTDOWN, task)
    assert await task == Snoozed(timedelta(0), WaitReason.SHUTDOWN)
    assert (steps.passed, len(steps.settled)) == ([], 1)


async def test_a_run_that_waits_in_its_slot_is_interrupted_there() -> None:
    steps, job = Steps(), claimed_job()
    execution = steps.execution(again=1)
    task = asyncio.create_task(execution.run(job))
    await steps.waiting.wait()
    execution.interrupt(job, WaitReason.SHUTDOWN, task)
    assert await task == Snoozed(timedelta(0), WaitReason.SHUTDOWN)
    assert steps.settled[1].call == CallNumber(2)


async def test_a_job_that_its_own_worker_claims_again_ends_its_older_run() -> None:
    """As after a freeze, when the claim comes before the heartbeat that would tell of the loss."""
    steps, job = Steps(asyncio.Event()), claimed_job()
    running = Running({}, steps.execution(), Metrics(enabled=False))
    older = running.start(job)
    await steps.reached.wait()
    steps.reached.clear()
    running.start(replace(job, run=RunNumber(2)))
    async with asyncio.timeout(10):
        await older
    assert [(run.job.run, run.outcome) for run in steps.settled] == [
        (1, Snoozed(timedelta(0), WaitReason.LOST_LEASE))
    ]
    assert len(running) == 1
    await steps.reached.wait()
    running.give_back()
    await running.until_ended()
