"""Azure's shapes of address and key, at a real server."""

import json
from datetime import timedelta

import pytest

from headrace_shared.configuration import Configuration
from headrace_shared.errors import InvalidConfiguration
from headrace_shared.outcome import ErrorClass
from headrace_shared.request import Endpoint
from headrace_shared.testing.scripted_provider import Scripted, ScriptedProvider, completion, refusal
from headrace_workers.providers import ProviderClient
from headrace_workers.replies import Answered, Refused, Reply, Unknown

BODY = b'{"model":"gpt-4o","messages":[{"role":"user","content":"Hi"}]}'
DEPLOYMENT = "/openai/deployments/my-gpt-4o"

FILTERED = {
    "error": {
        "message": "The response was filtered due to the prompt triggering the content management policy.",
        "type": None,
        "param": "prompt",
        "code": "content_filter",
        "status": 400,
        "innererror": {"code": "ResponsibleAIPolicyViolation"},
    }
}


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_API_KEY", "azure-secret")


async def ask(
    server: ScriptedProvider, path: str, *, endpoint: Endpoint = Endpoint.CHAT_COMPLETIONS, **section: str
) -> Reply:
    provider = {"base_url": server.address + path, "priced_as": "azure", **section}
    configuration = Configuration.from_document({"providers": {"azure": provider}})
    client = ProviderClient(configuration.provider("azure"), connections=1)
    try:
        return await client.call(endpoint, BODY)
    finally:
        await client.close()


def headers_of(head: str) -> dict[str, str]:
    lines = [line.partition(": ") for line in head.split("\r\n")[1:] if line]
    return {name.lower(): value for name, _, value in lines}


async def test_a_deployment_is_called_with_its_version_and_its_key_in_a_header_of_its_own() -> None:
    async with ScriptedProvider([completion()]) as server:
        reply = await ask(server, f"{DEPLOYMENT}/?api-version=2024-10-21", key_header="api-key")
        (head,) = server.heads
    assert isinstance(reply, Answered)
    assert head.startswith(f"POST {DEPLOYMENT}/chat/completions?api-version=2024-10-21 HTTP/1.1\r\n")
    headers = headers_of(head)
    assert headers["api-key"] == "azure-secret"
    assert "authorization" not in headers
    assert server.requests == [BODY]


async def test_an_embedding_goes_to_its_own_path() -> None:
    async with ScriptedProvider([refusal(400, "no")]) as server:
        address = f"{DEPLOYMENT}?api-version=2024-10-21"
        await ask(server, address, endpoint=Endpoint.EMBEDDINGS, key_header="api-key")
        assert server.heads[0].startswith(f"POST {DEPLOYMENT}/embeddings?api-version=2024-10-21 ")


@pytest.mark.parametrize("query", ["", "?api-version=preview"])
async def test_the_shape_of_today_needs_no_version_and_names_the_deployment_as_the_model(query: str) -> None:
    async with ScriptedProvider([completion()]) as server:
        reply = await ask(server, f"/openai/v1/{query}", key_header="api-key")
        (head,) = server.heads
    assert isinstance(reply, Answered)
    assert head.startswith(f"POST /openai/v1/chat/completions{query} HTTP/1.1\r\n")
    assert headers_of(head)["api-key"] == "azure-secret"
    assert json.loads(server.requests[0])["model"] == "gpt-4o"


async def test_without_a_header_of_its_own_the_key_is_a_bearer_token() -> None:
    async with ScriptedProvider([completion()]) as server:
        await ask(server, "/openai/v1")
        headers = headers_of(server.heads[0])
    assert headers["authorization"] == "Bearer azure-secret"
    assert "api-key" not in headers


@pytest.mark.parametrize(
    ("answer", "error_class"),
    [
        (Scripted(400, json.dumps(FILTERED).encode()), ErrorClass.CONTENT_FILTER),
        (
            refusal(
                400, "This model's maximum context length is 8192 tokens.", code="context_length_exceeded"
            ),
            ErrorClass.CONTEXT_TOO_LONG,
        ),
        (
            Scripted(400, b'{"error":{"code":400,"message":"too large","type":"exceed_context_size_error"}}'),
            ErrorClass.CONTEXT_TOO_LONG,
        ),
        (refusal(400, "This model's maximum context length is 8192 tokens."), ErrorClass.CONTEXT_TOO_LONG),
        (refusal(401, "Access denied due to invalid subscription key.", code="401"), ErrorClass.AUTH),
        (refusal(429, "Exceeded call rate limit.", code="429"), ErrorClass.RATE_LIMITED),
        (
            refusal(404, "The API deployment does not exist.", code="DeploymentNotFound"),
            ErrorClass.BAD_REQUEST,
        ),
    ],
)
async def test_what_it_refuses_is_understood(answer: Scripted, error_class: ErrorClass) -> None:
    async with ScriptedProvider([answer]) as server:
        reply = await ask(server, f"{DEPLOYMENT}?api-version=2024-10-21", key_header="api-key")
    assert isinstance(reply, Refused)
    assert reply.failure.error_class is error_class


async def test_a_target_may_have_less_time_than_its_provider() -> None:
    async with ScriptedProvider([completion()]) as server:
        server.open.clear()
        section = {"base_url": f"{server.url}", "priced_as": "openai"}
        target = {"provider": "azure", "model": "m", "total_timeout": "50ms"}
        configuration = Configuration.from_document(
            {"providers": {"azure": section}, "routes": {"m": {"targets": [target]}}}
        )
        route = configuration.resolve_route("m")
        client = ProviderClient(configuration.provider("azure"), connections=1)
        reply = await client.call(Endpoint.CHAT_COMPLETIONS, BODY, route.timeouts[route.targets[0]])
        await client.close()
    assert isinstance(reply, Unknown)
    assert reply.failure.error_class is ErrorClass.TIMEOUT
    assert reply.latency < timedelta(seconds=configuration.provider("azure").timeouts.total.total_seconds())


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"base_url": "https://x.example/v1?api-key=sk-very-secret"}, "must not hold a secret"),
        ({"base_url": "https://x.example/v1#part"}, "must be an address"),
        ({"base_url": "https://x.example/v1", "key_header": "api key"}, "must be the name of a header"),
    ],
)
def test_an_address_with_a_secret_is_refused_and_not_repeated(section: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidConfiguration, match=message) as refused:
        Configuration.from_document({"providers": {"azure": section}})
    assert "sk-very-secret" not in str(refused.value)
