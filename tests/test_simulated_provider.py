"""The simulated provider, seen through the unmodified SDK of OpenAI."""

import asyncio
import json
import signal
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import timedelta

import aiohttp
import openai
import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletion

from headrace_shared.errors import InvalidConfiguration
from headrace_shared.testing.behaviour import Behaviour
from headrace_shared.testing.calls import Endpoint, prompt_hash
from headrace_shared.testing.simulated_provider import SimulatedProvider


@asynccontextmanager
async def simulation(
    behaviour: Behaviour | None = None, *, patience: float = 10
) -> AsyncGenerator[tuple[SimulatedProvider, AsyncOpenAI]]:
    async with (
        SimulatedProvider(behaviour, record=True) as provider,
        AsyncOpenAI(base_url=provider.url, api_key="key-a", max_retries=0, timeout=patience) as client,
    ):
        yield provider, client


async def ask(
    client: AsyncOpenAI, prompt: str, *, model: str = "gpt-4o-mini", max_tokens: int = 1000
) -> ChatCompletion:
    return await client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": prompt}], max_tokens=max_tokens
    )


async def outcomes(client: AsyncOpenAI, count: int) -> list[int]:
    statuses: list[int] = []
    for number in range(count):
        try:
            await ask(client, f"prompt {number}")
            statuses.append(200)
        except openai.APIStatusError as error:
            statuses.append(error.status_code)
    return statuses


async def test_the_sdk_reads_the_answers_of_all_endpoints() -> None:
    async with simulation() as (_, client):
        chat = await ask(client, "Hello")
        response = await client.responses.create(model="gpt-4o", input="Hello")
        listed = await client.embeddings.create(model="text-embedding-3-small", input=["a", "b"])
        floats = await client.embeddings.create(
            model="text-embedding-3-small", input="a", encoding_format="float", dimensions=5
        )
        moderation = await client.moderations.create(input=["a", "b", "c"])
        assert "simulated" in (chat.choices[0].message.content or "")
        assert "simulated" in response.output_text
        assert response.status == "completed"
        assert [len(item.embedding) for item in listed.data] == [16, 16]
        assert len(floats.data[0].embedding) == 5
        assert [result.flagged for result in moderation.results] == [False] * 3
        assert chat.id.startswith("chatcmpl-")
        assert [model.id async for model in client.models.list()]
        assert (await client.models.retrieve("org/model")).id == "org/model"


async def test_an_answer_depends_on_its_prompt_and_ends_at_the_maximum() -> None:
    async with simulation() as (_, client):
        first, again, other = [await ask(client, prompt) for prompt in ("one", "one", "another")]
        assert first.choices == again.choices
        assert first.id != again.id
        assert first.choices != other.choices
        short = await ask(client, "one", max_tokens=3)
        assert short.choices[0].finish_reason == "length"
        assert short.usage is not None
        assert short.usage.completion_tokens == 3
        cut = await client.responses.create(model="gpt-4o", input="one", max_output_tokens=4)
        assert cut.incomplete_details is not None
        assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        assert (await ask(client, "one", model="filtered-x")).choices[0].finish_reason == "content_filter"


async def test_the_books_are_the_sum_of_the_answers() -> None:
    async with simulation() as (provider, client):
        answers = await asyncio.gather(*(ask(client, f"prompt {n} " + "x" * 200 * n) for n in range(40)))
        await client.embeddings.create(model="text-embedding-3-small", input="x")
        usages = [answer.usage for answer in answers if answer.usage is not None]
        chats = provider.books.of(model="gpt-4o-mini", endpoint=Endpoint.CHAT_COMPLETIONS)
        assert chats.requests == chats.answered == len(usages) == 40
        assert chats.prompt_tokens == sum(usage.prompt_tokens for usage in usages)
        assert chats.completion_tokens == sum(usage.completion_tokens for usage in usages)
        cached = [
            usage.prompt_tokens_details.cached_tokens or 0 for usage in usages if usage.prompt_tokens_details
        ]
        assert chats.cached_tokens == sum(cached) > 0
        assert provider.books.total.requests == 41
        assert provider.books.requests_by_key == {"key-a": 41}
        assert prompt_hash("x") in {request.prompt_hash for request in provider.books.requests}


async def test_a_prompt_never_counts_more_tokens_than_its_body_has_bytes() -> None:
    body = {"model": "m", "messages": [{"role": "u"}] * 30, "max_tokens": 1}
    async with simulation() as (provider, _), aiohttp.ClientSession() as session:
        raw = json.dumps(body, separators=(",", ":")).encode()
        url, headers = f"{provider.url}/chat/completions", {"Authorization": "Bearer k"}
        async with session.post(url, data=raw, headers=headers) as response:
            assert response.status == 200
            assert response.headers["x-ratelimit-remaining-requests"]
        assert 0 < provider.books.total.prompt_tokens <= len(raw)


@pytest.mark.parametrize("endpoint", ["chat", "responses"])
async def test_the_sdk_reads_a_stream(endpoint: str) -> None:
    async with simulation() as (provider, client):
        if endpoint == "chat":
            stream = await client.chat.completions.create(
                model="gpt-4o", messages=[{"role": "user", "content": "Hi"}], stream=True,
                stream_options={"include_usage": True},
            )  # fmt: skip
            chunks = [chunk async for chunk in stream]
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            usage = chunks[-1].usage
            tokens = usage.completion_tokens if usage else None
        else:
            async with client.responses.stream(model="gpt-4o", input="Hi") as events:
                response = await events.get_final_response()
            text, tokens = response.output_text, response.usage.output_tokens if response.usage else None
        assert "simulated" in text
        assert provider.books.total.completion_tokens == tokens
        assert provider.books.total.answered == 1


@pytest.mark.parametrize(
    ("model", "status", "code"),
    [
        ("missing-x", 404, "model_not_found"),
        ("quota-x", 429, "insufficient_quota"),
        ("refused-x", 400, "content_filter"),
    ],
)
async def test_special_models_are_refused_in_the_shape_of_openai(model: str, status: int, code: str) -> None:
    async with simulation() as (provider, client):
        with pytest.raises(openai.APIStatusError) as caught:
            await ask(client, "Hello", model=model)
        assert (caught.value.status_code, caught.value.code) == (status, code)
        assert provider.books.total.by_status == {status: 1}
        assert provider.books.total.total_tokens == 0


@pytest.mark.parametrize(
    ("body", "key", "status", "param"),
    [
        (b"{", "k", 400, None),
        (b"[]", "k", 400, None),
        (b'{"messages": [{}]}', "k", 400, "model"),
        (b'{"model": "m"}', "k", 400, "messages"),
        (
            b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 0}',
            "k",
            400,
            "max_tokens",
        ),
        (b'{"model": "m", "messages": [{"role": "user", "content": "x"}]}', "", 401, None),
    ],
)
async def test_a_wrong_request_is_refused(body: bytes, key: str, status: int, param: str | None) -> None:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with simulation() as (provider, _), aiohttp.ClientSession() as session:
        async with session.post(f"{provider.url}/chat/completions", data=body, headers=headers) as response:
            error = (await response.json())["error"]
        assert (response.status, error["param"]) == (status, param)


async def test_the_same_seed_fails_the_same_calls() -> None:
    runs: list[list[int]] = []
    for seed in (7, 7, 8):
        async with simulation(Behaviour(fail=0.4, retry_after=timedelta(seconds=3), seed=seed)) as (
            provider,
            client,
        ):
            runs.append(await outcomes(client, 60))
            provider.reset()
            assert await outcomes(client, 60) == runs[-1]
    assert runs[0] == runs[1] != runs[2]
    assert set(runs[0]) == {200, 429, 500}


async def test_a_limit_per_minute_is_kept_and_reported() -> None:
    async with simulation(Behaviour(requests_per_minute=2)) as (_, client):
        assert await outcomes(client, 2) == [200, 200]
        with pytest.raises(openai.RateLimitError) as caught:
            await ask(client, "one too many")
        headers = caught.value.response.headers
        assert headers["x-ratelimit-limit-requests"] == "2"
        assert headers["x-ratelimit-remaining-requests"] == "0"
        assert 0 < int(headers["retry-after"]) <= 30


async def test_an_outage_begins_and_ends_at_run_time() -> None:
    async with simulation() as (provider, client), aiohttp.ClientSession() as session:
        switch = provider.url.removesuffix("/v1") + "/behaviour"
        async with session.post(switch, json={"outage": True}) as response:
            assert response.status == 200
        assert await outcomes(client, 2) == [503, 503]
        async with session.post(switch, json={"outtage": False}) as response:
            assert response.status == 400
        provider.behave(Behaviour())
        assert await outcomes(client, 1) == [200]


@pytest.mark.parametrize(
    ("behaviour", "patience", "error", "status"),
    [
        (Behaviour(cut=1), 10, openai.APIConnectionError, 200),
        (Behaviour(garbage=1), 10, json.JSONDecodeError, 200),
        (Behaviour(hang=1), 0.2, openai.APITimeoutError, None),
        (Behaviour(latency=timedelta(hours=1)), 0.2, openai.APITimeoutError, None),
    ],
    ids=["cut", "garbage", "hang", "left"],
)
async def test_what_was_generated_but_not_read_is_billed_apart(
    behaviour: Behaviour, patience: float, error: type[Exception], status: int | None
) -> None:
    async with simulation(behaviour, patience=patience) as (provider, client):
        with pytest.raises(error):
            await ask(client, "Hello")
        await provider.books.until(lambda: provider.books.total.requests == 1)
        total = provider.books.total
        assert (total.requests, total.answered, total.unanswered) == (1, 0, 1)
        assert (total.total_tokens, provider.books.requests[0].status) == (0, status)
        assert total.unanswered_prompt_tokens > 0
        assert total.unanswered_completion_tokens > 0


def test_impossible_behaviour_is_refused() -> None:
    with pytest.raises(InvalidConfiguration):
        Behaviour(hang=0.6, cut=0.6)


@pytest.mark.parametrize("workers", [1, 2])
async def test_the_command_serves_until_it_is_told_to_stop(workers: int) -> None:
    code = (
        "import typer; from headrace_shared.testing.command import simulate_provider as run; "
        "app = typer.Typer(); app.command()(run); app()"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, "--json", "--workers", str(workers), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    url: str = json.loads(await process.stdout.readline())["url"]
    async with AsyncOpenAI(base_url=url, api_key="k", max_retries=0) as client:
        assert await outcomes(client, 10) == [200] * 10
    async with (
        aiohttp.ClientSession() as session,
        session.get(url.removesuffix("/v1") + "/stats") as response,
    ):
        assert (await response.json())["total"]["answered"] == 10
    process.send_signal(signal.SIGTERM)
    assert await process.wait() == 0
