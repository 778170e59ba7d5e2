"""A call that failed goes on with the next target, in the same run, and everybody can see it."""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta

import pytest
from command_line import Command

from headrace_producer import Headrace
from headrace_shared.dispatch import breakers
from headrace_shared.dispatch.dispatch import Dispatch
from headrace_shared.ids import JobId
from headrace_shared.job import JobState
from headrace_shared.outcome import ErrorClass
from headrace_shared.request import Endpoint
from headrace_shared.routes import Target
from headrace_shared.store.pool import Pool
from headrace_shared.testing.jobs import Jobs
from headrace_shared.testing.scripted_provider import Scripted, ScriptedProvider, completion, refusal
from headrace_workers.testing import running_worker

pytestmark = pytest.mark.usefixtures("environment")

PRICE = {"input": "1.00", "output": "2.00"}
QUICK = {"initial": "1ms", "maximum": "2ms"}
TOO_LONG = refusal(400, "Too many tokens.", code="context_length_exceeded")
FILTERED = refusal(400, "Not this.", code="content_filter")
LIMITED = refusal(429, "Slow down.", headers={"retry-after": "60"})
DOWN = refusal(503, "Down.")
SORRY = "Nobody is there; please try again tomorrow."


@dataclass(frozen=True, slots=True)
class Stage:
    """Three providers, `a`, `b` and `c`, and a route `m` over them."""

    jobs: Jobs
    servers: Mapping[str, ScriptedProvider]

    async def configure(
        self, *targets: str, fallbacks: Mapping[str, tuple[str, ...]] | None = None, **route: object
    ) -> None:
        called = [{"provider": name, "model": "m"} for name in targets]
        after = [{"provider": name, "model": "m", "on": on} for name, on in (fallbacks or {}).items()]
        await self.jobs.configure(
            {
                "retries": QUICK,
                "providers": {
                    name: {"base_url": server.url, "api_key": "env:ANY_KEY"}
                    for name, server in self.servers.items()
                },
                "prices": {f"{name}/m": PRICE for name in self.servers},
                "routes": {"m": {"targets": called, "fallbacks": after, **route}},
            }
        )

    async def run(self, **job: object) -> JobId:
        endpoint = job.pop("endpoint", Endpoint.CHAT_COMPLETIONS)
        most = job.pop("max_attempts", 6)
        assert isinstance(endpoint, Endpoint)
        assert isinstance(most, int)
        body = {"input": "Hi"} if endpoint is not Endpoint.CHAT_COMPLETIONS else None
        (job_id,) = await self.jobs.add(model="m", endpoint=endpoint, body=body, max_attempts=most)
        async with running_worker():
            await self.jobs.ended([job_id])
        return job_id

    async def calls(self, job_id: JobId) -> list[tuple[str, str, int]]:
        return [(call["provider"], call["state"], call["run"]) for call in await self.jobs.calls(job_id)]

    async def attempts(self, job_id: JobId) -> list[tuple[int, str, str | None]]:
        found = await self.jobs.attempts(job_id)
        return [(one["number"], one["outcome"], one["error_class"]) for one in found]


@pytest.fixture
async def stage(pool: Pool, dispatch: Dispatch, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stage]:
    for name in ("ANY_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, "sk-any")
    async with AsyncExitStack() as stack:
        servers = {
            name: await stack.enter_async_context(ScriptedProvider([completion(f"I am {name}.")]))
            for name in ("a", "b", "c")
        }
        yield Stage(Jobs(pool, dispatch), servers)


@pytest.mark.parametrize(
    ("answer", "on"),
    [
        (DOWN, "down"),
        (LIMITED, "rate_limited"),
        (TOO_LONG, "context_too_long"),
        (FILTERED, "content_filter"),
    ],
)
async def test_a_call_that_failed_goes_on_with_the_fallback_for_its_class(
    stage: Stage, answer: Scripted, on: str
) -> None:
    await stage.configure("a", fallbacks={"b": (on,)})
    stage.servers["a"].script(answer)
    job_id = await stage.run()
    ending = await stage.jobs.ending(job_id)
    assert (ending.job.state, ending.job.run, ending.job.attempts) == (JobState.SUCCEEDED, 1, 1)
    assert ending.answer is not None
    assert (ending.answer.provider, b"I am b." in ending.answer.body) == ("b", True)
    assert await stage.calls(job_id) == [("a", "failed", 1), ("b", "answered", 1)]
    attempts = await stage.attempts(job_id)
    assert [(number, outcome) for number, outcome, _ in attempts] == [(1, "retried"), (2, "succeeded")]
    assert await stage.jobs.spend() == await stage.jobs.ledger()


async def test_a_fallback_for_another_class_is_not_called(stage: Stage) -> None:
    await stage.configure("a", fallbacks={"b": ("down", "rate_limited", "content_filter")})
    stage.servers["a"].script(TOO_LONG)
    ending = await stage.jobs.ending(await stage.run())
    assert (ending.job.state, ending.job.error_class) == (JobState.FAILED, ErrorClass.CONTEXT_TOO_LONG)
    assert stage.servers["b"].requests == []


async def test_another_deployment_comes_before_the_fallbacks(stage: Stage) -> None:
    await stage.configure("a", "b", fallbacks={"c": ("down",)}, strategy="least-loaded")
    for name in ("a", "b"):
        stage.servers[name].script(DOWN)
    job_id = await stage.run()
    tried = [provider for provider, _, _ in await stage.calls(job_id)]
    assert (sorted(tried[:2]), tried[2:]) == (["a", "b"], ["c"])


async def test_attempts_stay_bounded_and_each_call_is_one(stage: Stage) -> None:
    await stage.configure("a", fallbacks={"b": ("down",)})
    for name in ("a", "b"):
        stage.servers[name].script(DOWN)
    job_id = await stage.run(max_attempts=5)
    ending = await stage.jobs.ending(job_id)
    assert (ending.job.state, ending.job.attempts) == (JobState.FAILED, 5)
    assert [provider for provider, _, _ in await stage.calls(job_id)] == ["a", "b", "a", "b", "a"]
    assert [number for number, _, _ in await stage.attempts(job_id)] == [1, 2, 3, 4, 5]


async def test_a_model_that_is_too_small_is_not_asked_again_in_the_same_run(stage: Stage) -> None:
    await stage.configure("a", fallbacks={"b": ("context_too_long",)})
    stage.servers["a"].script(TOO_LONG)
    stage.servers["b"].script(DOWN, completion())
    job_id = await stage.run()
    assert [provider for provider, _, _ in await stage.calls(job_id)] == ["a", "b", "b"]


async def test_each_call_has_its_own_hold_and_price(stage: Stage) -> None:
    await stage.configure("a", fallbacks={"b": ("down",)})
    stage.servers["a"].script(DOWN)
    calls = await stage.jobs.calls(await stage.run())
    assert len({call["hold_id"] for call in calls}) == 2
    assert [call["cost_nano"] > 0 for call in calls] == [False, True]


async def test_an_open_breaker_leads_to_the_fallback_and_closes_no_gate(
    stage: Stage, dispatch: Dispatch
) -> None:
    await stage.configure("a", fallbacks={"b": ("down",)})
    stage.servers["a"].script(DOWN)
    await breakers.open_(dispatch.redis, Target("a", "m"), timedelta(minutes=5), None)
    job_ids = await stage.jobs.add(8, model="m")
    async with running_worker(concurrency=1):
        await stage.jobs.ended(job_ids)
    assert len(stage.servers["b"].requests) == 8
    assert await dispatch.gates() == []


@pytest.mark.parametrize("endpoint", [Endpoint.CHAT_COMPLETIONS, Endpoint.RESPONSES])
async def test_the_routes_own_answer_is_the_last_resort_and_says_so(
    stage: Stage, endpoint: Endpoint, headrace: Headrace
) -> None:
    await stage.configure("a", fallbacks={"b": ("down",)}, answer=SORRY)
    for name in ("a", "b"):
        stage.servers[name].script(DOWN)
    job_id = await stage.run(max_attempts=3, endpoint=endpoint)
    result = await headrace.result(job_id)
    assert (result.provider, result.model) == ("static", "m")
    assert result.body["model"] == "static/m"
    assert SORRY in json.dumps(result.body)
    assert result.usage.cost_nano_usd == 0
    calls = await stage.calls(job_id)
    assert [provider for provider, _, _ in calls] == ["a", "b", "a", "static"]
    assert [state for _, state, _ in calls] == ["failed"] * 3 + ["answered"]
    attempts = await stage.attempts(job_id)
    assert [outcome for _, outcome, _ in attempts] == ["retried"] * 3 + ["succeeded"]
    assert await stage.jobs.spend() == await stage.jobs.ledger()


async def test_a_text_answers_no_embedding(stage: Stage) -> None:
    await stage.configure("a", answer=SORRY)
    stage.servers["a"].script(DOWN)
    ending = await stage.jobs.ending(await stage.run(max_attempts=1, endpoint=Endpoint.EMBEDDINGS))
    assert (ending.job.state, ending.job.error_class) == (JobState.FAILED, ErrorClass.TRANSIENT)


async def test_a_request_that_is_wrong_gets_no_answer_of_the_route(stage: Stage) -> None:
    await stage.configure("a", answer=SORRY)
    stage.servers["a"].script(refusal(400, "No such parameter."))
    ending = await stage.jobs.ending(await stage.run())
    assert (ending.job.state, ending.job.error_class) == (JobState.FAILED, ErrorClass.BAD_REQUEST)


async def test_the_routes_own_answer_of_a_run_that_lost_its_row_ends_nothing(
    stage: Stage, pool: Pool
) -> None:
    await stage.configure("a", answer=SORRY)
    a = stage.servers["a"]
    a.open.clear()
    a.script(DOWN)
    (job_id,) = await stage.jobs.add(model="m", max_attempts=1)
    async with running_worker():
        await a.arrived(1)
        # Somebody else claimed it: its next run is not this one's.
        await pool.execute("UPDATE headrace.jobs SET run = run + 1 WHERE id = $1", job_id)
        a.open.set()
        await stage.jobs.until(job_id, lambda row: row["run"] == 2)
    assert [provider for provider, _, _ in await stage.calls(job_id)] == ["a"]
    assert (await stage.jobs.ending(job_id)).job.state is JobState.RUNNING


async def test_status_says_who_was_called_and_usage_who_was_paid(stage: Stage, command: Command) -> None:
    await stage.configure("a", fallbacks={"b": ("context_too_long",)})
    stage.servers["a"].script(TOO_LONG)
    job_id = await stage.run()
    shown = await command("status", str(job_id))
    assert "a/m: context_too_long" in shown.out
    assert "b/m: succeeded" in shown.out
    tried = (await command("status", str(job_id), "--json")).rows("tried")
    assert [(one["provider"], one["outcome"]) for one in tried] == [("a", "retried"), ("b", "succeeded")]
    groups = (await command("usage", "--by", "provider", "--json")).rows("groups")
    assert {(one["provider"], one["answered"]) for one in groups} == {("a", 0), ("b", 1)}
