"""Bad input is refused where it comes in, with its field and the reason, and changes nothing."""

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import cast

import pytest

from headrace_producer import Headrace, JobRequest
from headrace_shared.configuration import parse_toml
from headrace_shared.dispatch.connection import Redis
from headrace_shared.errors import (
    BodyTooLarge,
    ClientNotOpen,
    InvalidInput,
    InvalidRequest,
    InvalidWebhook,
    MissingSetting,
    UnknownPrice,
)
from headrace_shared.store import configurations
from headrace_shared.store.pool import Pool
from headrace_shared.testing.clock import script

CHAT = "/v1/chat/completions"
CONFIGURATION = """
[defaults]
max_body_bytes = 1000
any_model = false
[providers.other]
base_url = "https://example.com/v1"
[routes.gpt-4o-mini]
targets = [{provider = "openai", model = "gpt-4o-mini"}]
[routes.text-embedding-3-small]
targets = [{provider = "openai", model = "text-embedding-3-small"}]
[routes.half-priced]
targets = [{provider = "openai", model = "gpt-4o-mini"}, {provider = "other", model = "unheard-of"}]
"""
COUNTS = """
SELECT (SELECT count(*) FROM headrace.jobs), (SELECT count(*) FROM headrace.idempotency),
       (SELECT count(*) FROM headrace.calls), (SELECT count(*) FROM headrace.deliveries)
"""
GOOD: Mapping[str, object] = {
    "model": "gpt-4o-mini",
    "messages": [{"role": "user", "content": "Hello"}],
}


def body(**fields: object) -> Mapping[str, object]:
    return {**GOOD, **fields}


def untyped(endpoint: object = CHAT, content: object = GOOD, **options: object) -> JobRequest:
    """A request as somebody without a type checker may make it."""
    make = cast("Callable[..., JobRequest]", JobRequest)
    return make(endpoint, content, **options)


BAD: list[tuple[JobRequest, type[InvalidInput], str]] = [
    (untyped("/v1/chat/completion"), InvalidRequest, "endpoint: '/v1/chat/completion' is not known"),
    (untyped(None), InvalidRequest, "endpoint: must be a string"),
    (untyped(content=None), InvalidRequest, "body: must be a mapping"),
    (untyped(content=[GOOD]), InvalidRequest, "body: must be a mapping"),
    (untyped(content=b"{"), InvalidRequest, "body: is not JSON"),
    (untyped(content=b"\xff"), InvalidRequest, "body: is not UTF-8"),
    (untyped(content="[]"), InvalidRequest, "body: must be a JSON object"),
    (untyped(content=body(temperature=float("nan"))), InvalidRequest, "body: cannot be written as JSON"),
    (untyped(content=body(user="\0")), InvalidRequest, "body.user: contains a NUL"),
    (untyped(content=body(user="\ud800")), InvalidRequest, "body: contains half of a surrogate"),
    (untyped(content=body(user="x" * 1000)), BodyTooLarge, "body: is 1,0"),
    (untyped(content=body(model=None)), InvalidRequest, "model: must be a string"),
    (untyped(content=body(model="gpt-4o-mni")), InvalidRequest, "model: there is no route 'gpt-4o-mni'"),
    (untyped(content=body(messages=[])), InvalidRequest, "messages: must be a list"),
    (untyped(content=body(stream=True)), InvalidRequest, "stream: must be absent"),
    (untyped(content=body(max_tokens=0)), InvalidRequest, "max_tokens: must be a positive"),
    (untyped(content=body(model="half-priced")), UnknownPrice, "No price is known for other/unheard-of"),
    (
        untyped(content=body(model="text-embedding-3-small")),
        UnknownPrice,
        "No price is known for openai/text-embedding-3-small",
    ),
    (untyped(tenant=""), InvalidRequest, "tenant: must be 1 to 64"),
    (untyped(tenant="a b"), InvalidRequest, "tenant: must be 1 to 64"),
    (untyped(tenant="a\n"), InvalidRequest, "tenant: must be 1 to 64"),
    (untyped(tenant="a" * 65), InvalidRequest, "tenant: must be 1 to 64"),
    (untyped(tenant=17), InvalidRequest, "tenant: must be 1 to 64"),
    (untyped(lane="night"), InvalidRequest, "lane: 'night' is not one of interactive, default, batch"),
    (untyped(lane=["batch"]), InvalidRequest, "lane: "),
    (untyped(idempotency_key=""), InvalidRequest, "idempotency_key: must be 1 to 255"),
    (untyped(idempotency_key="k" * 256), InvalidRequest, "idempotency_key: must be 1 to 255"),
    (untyped(idempotency_key="a\0"), InvalidRequest, "idempotency_key: must be 1 to 255"),
    (untyped(idempotency_key="a\ud800"), InvalidRequest, "idempotency_key: must be 1 to 255"),
    (untyped(idempotency_key=17), InvalidRequest, "idempotency_key: must be 1 to 255"),
    (untyped(webhook=""), InvalidWebhook, "webhook: "),
    (untyped(webhook=17), InvalidWebhook, "webhook: must be a string"),
    (untyped(webhook="http://example.com/"), InvalidWebhook, "webhook: must begin with https://"),
    (untyped(webhook="https://10.0.0.1/"), InvalidWebhook, "webhook: 10.0.0.1 is not a public address"),
    (untyped(metadata=[]), InvalidRequest, "metadata: must be a mapping"),
    (untyped(metadata={f"{n}": "" for n in range(17)}), InvalidRequest, "metadata: must have at most 16"),
    (untyped(metadata={"": ""}), InvalidRequest, "metadata: the key '' must"),
    (untyped(metadata={"k" * 65: ""}), InvalidRequest, "metadata: the key 'kkk"),
    (untyped(metadata={17: ""}), InvalidRequest, "metadata: the key '17' must"),
    (untyped(metadata={"order": 17}), InvalidRequest, "metadata.order: must be a string"),
    (untyped(metadata={"order": "v" * 513}), InvalidRequest, "metadata.order: must be a string"),
    (untyped(metadata={"order": "\0"}), InvalidRequest, "metadata.order: must be a string"),
    (untyped(metadata={"order": "\udfff"}), InvalidRequest, "metadata.order: must be a string"),
    (untyped(delay=5), InvalidRequest, "delay: must be a timedelta"),
    (untyped(delay=timedelta(seconds=-1)), InvalidRequest, "delay: must be a timedelta"),
    (untyped(delay=timedelta.max), InvalidRequest, "delay: must be a timedelta"),
    (untyped(max_attempts=0), InvalidRequest, "max_attempts: must be a whole number"),
    (untyped(max_attempts=True), InvalidRequest, "max_attempts: must be a whole number"),
    (untyped(max_attempts=2**31), InvalidRequest, "max_attempts: must be a whole number"),
]


@pytest.mark.parametrize("bad", BAD, ids=[message for _, _, message in BAD])
async def test_it_is_refused(
    environment: None, pool: Pool, redis: Redis, bad: tuple[JobRequest, type[InvalidInput], str]
) -> None:
    request, kind, message = bad
    await configurations.apply(pool, parse_toml(CONFIGURATION, "test"), "test")
    async with Headrace() as headrace:
        for requests in ([request], [untyped(), request, untyped()]):
            with pytest.raises(InvalidInput) as refused:
                await headrace.enqueue_many(requests)
            assert type(refused.value) is kind
            assert str(refused.value).startswith(message)
        assert tuple(await pool.fetchrow(COUNTS) or ()) == (0, 0, 0, 0)
        assert await redis.evaluate(script("return redis.call('DBSIZE')")) == 0
        assert not (await headrace.enqueue_many([untyped()]))[0].existed


@pytest.mark.parametrize(
    "good",
    [
        untyped(tenant="A.b_c-9"),
        untyped(idempotency_key="Zoë's order № 17"),
        untyped(metadata={f"{n}": "v" * 512 for n in range(16)}),
        untyped(metadata={"k" * 64: "a\nb"}),
        untyped(webhook="https://example.com:8443/hook?a=b"),
        untyped(delay=timedelta(days=365), max_attempts=100),
        untyped("/v1/embeddings", {"model": "text-embedding-3-small", "input": "Hello"}),
    ],
)
async def test_what_is_just_within_the_bounds_is_accepted(headrace: Headrace, good: JobRequest) -> None:
    (handle,) = await headrace.enqueue_many([good])
    assert (await handle.get()).metadata == (good.metadata or {})


async def test_a_wrong_tenant_or_id_is_refused(headrace: Headrace) -> None:
    with pytest.raises(InvalidRequest, match=r"^tenant: "):
        Headrace(tenant="a/b")
    with pytest.raises(InvalidRequest, match=r"^job_id: 'seventeen' is not a UUID"):
        await headrace.get("seventeen")
    with pytest.raises(InvalidRequest, match=r"^tenant: "):
        await headrace.list(tenant="a/b")


async def test_a_client_is_used_inside_its_block(postgres_url: str, redis_url: str) -> None:
    headrace = Headrace(postgres_url, redis_url)
    with pytest.raises(ClientNotOpen, match="async with"):
        await headrace.enqueue(CHAT, GOOD)
    async with headrace:
        await headrace.enqueue(CHAT, GOOD)
    with pytest.raises(ClientNotOpen):
        await headrace.enqueue(CHAT, GOOD)


async def test_servers_that_nobody_names_are_missing(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    with pytest.raises(MissingSetting, match="HEADRACE_POSTGRES_URL is not set"):
        async with Headrace():
            pass
    with pytest.raises(MissingSetting, match="HEADRACE_REDIS_URL is not set"):
        async with Headrace("postgresql://localhost/none"):
            pass
