import json
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace_shared.errors import BodyTooLarge, HeadraceError, InvalidRequest
from headrace_shared.request import ENDPOINTS, CheckedRequest, Endpoint, check_request, prepare

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hello"}]


def check(endpoint: str, body: Mapping[str, object] | bytes | str) -> CheckedRequest:
    return check_request(endpoint, body, max_body_bytes=1_000_000)


def chat(**fields: object) -> dict[str, object]:
    return {"model": "gpt-4o-mini", "messages": MESSAGES, **fields}


def respond(**fields: object) -> dict[str, object]:
    return {"model": "gpt-4o-mini", "input": "Hello", **fields}


def test_the_callers_own_bytes_are_kept() -> None:
    body = b'{ "messages": [{"content": "caf\xc3\xa9", "role": "user"}],\n"model": "m" }'
    checked = check(CHAT, body)
    assert checked.body == body
    assert (checked.endpoint, checked.model) == (Endpoint.CHAT_COMPLETIONS, "m")


def test_a_mapping_becomes_compact_utf8() -> None:
    checked = check(CHAT, {"model": "m", "messages": [{"role": "user", "content": "café"}]})
    assert checked.body == '{"model":"m","messages":[{"role":"user","content":"café"}]}'.encode()


def test_the_digest_knows_the_content_but_not_the_order_of_keys() -> None:
    one = check(CHAT, '{"model":"m","messages":[{"role":"user","content":"\\u00e9"}]}')
    same = check(CHAT, '{"messages": [{"content":"é","role":"user"}], "model":"m"}')
    other = check(CHAT, '{"messages": [{"content":"e","role":"user"}], "model":"m"}')
    assert one.digest == same.digest
    assert one.digest != other.digest
    assert check("/v1/responses", respond()).digest != check("/v1/moderations", respond()).digest


def test_of_repeated_keys_the_checked_one_is_sent() -> None:
    checked = check(CHAT, '{"model":"a","model":"b","messages":[{"role":"user","content":"x"}]}')
    assert checked.model == "b"
    assert checked.body.count(b"model") == 1


@pytest.mark.parametrize(
    ("endpoint", "body", "message"),
    [
        ("/chat/completions", chat(), r"endpoint: .* \(did you mean /v1/chat/completions\?\)"),
        (CHAT, b"{", "body: is not JSON"),
        (CHAT, b"\xff", "body: is not UTF-8"),
        (CHAT, b'{"model":"m"}'.decode().encode("utf-16"), "body: is not UTF-8"),
        (CHAT, b"[]", "body: must be a JSON object"),
        (CHAT, b'{"x":NaN}', "NaN is not a JSON number"),
        (CHAT, b'{"x":1e999}', "not finite"),
        (CHAT, {"x": float("inf")}, "cannot be written as JSON"),
        (CHAT, {"x": object()}, "cannot be written as JSON"),
        (CHAT, '{"x":' + "[" * 100_000, "nested too deeply"),
        (CHAT, chat(user="a\0b"), r"body\.user: contains a NUL"),
        (CHAT, '{"model":"m","x":[{"\\u0000":1}]}', r"body\.x\[0\]: contains a NUL"),
        (CHAT, '{"x":"a\0b"}', "is not JSON"),
        (CHAT, '{"x":"\\ud800"}', "half of a surrogate pair"),
        (CHAT, {"x": "\ud800"}, "half of a surrogate pair"),
        (CHAT, "\ud800", "half of a surrogate pair"),
        (CHAT, chat(stream=True), "stream: must be absent or false"),
        (CHAT, {"messages": MESSAGES}, "model: must be"),
        (CHAT, chat(model=""), "model: must be"),
        (CHAT, chat(model="a b"), "model: must be at most"),
        (CHAT, {"model": "m"}, "messages: must be a list"),
        (CHAT, chat(messages=["x"]), r"messages\[0\]: must be an object"),
        (CHAT, chat(max_tokens=0), "max_tokens: must be a positive"),
        (CHAT, chat(n=True), "n: must be a positive"),
        ("/v1/responses", {"model": "m"}, "input: must be"),
        ("/v1/responses", respond(input=[1]), r"input\[0\]: must be an object"),
        ("/v1/responses", respond(background=True), "background: must be absent"),
        ("/v1/embeddings", respond(input=[1, "a"]), "input: must be a string, a list"),
        ("/v1/moderations", respond(input=""), "input: must be"),
    ],
)
def test_a_wrong_request_is_refused_with_its_field(
    endpoint: str, body: Mapping[str, object] | bytes | str, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        check(endpoint, body)


def test_a_body_over_the_limit_is_refused_unread() -> None:
    with pytest.raises(BodyTooLarge, match="11 bytes, more than the 10"):
        check_request(CHAT, b"not json :(", max_body_bytes=10)


def test_what_is_complete_is_sent_as_it_came() -> None:
    body = check(CHAT, b' {"model":"m","max_tokens":5, "messages":[{"role":"user","content":"x"}]}\n').body
    prepared = prepare(body, Endpoint.CHAT_COMPLETIONS, "m", 100)
    assert prepared.body == body
    assert prepared.output_bound == 5


@pytest.mark.parametrize(
    ("endpoint", "body", "target", "expected", "output"),
    [
        (CHAT, chat(), "gpt-4o-mini", chat(max_completion_tokens=100), 100),
        (CHAT, chat(max_completion_tokens=None), "gpt-4o-mini", chat(max_completion_tokens=100), 100),
        (CHAT, chat(n=3), "x", chat(n=3, model="x", max_completion_tokens=100), 300),
        (CHAT, chat(n=2, max_tokens=7), "x", chat(n=2, model="x", max_tokens=7), 14),
        ("/v1/responses", respond(), "gpt-4o-mini", respond(max_output_tokens=100), 100),
        ("/v1/responses", respond(max_output_tokens=9), "x", respond(max_output_tokens=9, model="x"), 9),
        ("/v1/embeddings", respond(), "x", respond(model="x"), 0),
        ("/v1/moderations", respond(), "gpt-4o-mini", respond(), 0),
    ],
)
def test_a_body_gets_its_model_and_a_maximum_of_output(
    endpoint: str, body: Mapping[str, object], target: str, expected: Mapping[str, object], output: int
) -> None:
    checked = check(endpoint, body)
    prepared = prepare(checked.body, checked.endpoint, target, 100)
    assert json.loads(prepared.body) == expected
    assert prepared.output_bound == output


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ["model", "messages", "input", "stream", "n", "tools", "max_tokens", "content", "type", "modalities"]
KINDS = st.sampled_from(["text", "image_url", "file", "message", "reasoning", "function_call_output", "gpt"])
SHAPES = st.recursive(
    JSON | KINDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=6),
    max_leaves=12,
)


@settings(max_examples=400)
@given(
    endpoint=st.sampled_from(ENDPOINTS),
    body=st.dictionaries(st.sampled_from(FIELDS), SHAPES) | st.binary(max_size=20) | st.text(max_size=20),
    messages=st.lists(SHAPES, max_size=3),
)
def test_no_body_raises_anything_but_an_error_of_ours(
    endpoint: Endpoint, body: dict[str, object] | bytes | str, messages: list[object]
) -> None:
    whole = (
        {**body, "model": "m", "messages": messages, "input": messages} if isinstance(body, dict) else body
    )
    for candidate in (body, whole):
        try:
            checked = check(endpoint, candidate)
        except HeadraceError:
            continue
        prepared = prepare(checked.body, checked.endpoint, "another", 100)
        assert json.loads(prepared.body)["model"] == "another"
        assert prepared.input_bound > 0


def test_numbers_that_are_longer_when_a_request_is_written_anew_are_bounded_as_they_are_sent() -> None:
    schema = {"type": "integer", "enum": [0]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    written = json.dumps({"model": "alias", "messages": MESSAGES, "tools": tools, "max_tokens": 5})
    body = written.replace("[0]", f"[{', '.join(['1e15'] * 500)}]").encode()
    prepared = prepare(body, Endpoint.CHAT_COMPLETIONS, "gpt-4o-mini", 100)
    assert len(prepared.body) > 2 * len(body)
    assert prepared.input_bound > len(prepared.body)


def test_instructions_that_are_no_text_are_refused() -> None:
    body = {
        "model": "m",
        "input": "Hello",
        "instructions": [{"type": "input_image", "image_url": "https://x"}],
    }
    with pytest.raises(InvalidRequest, match="instructions"):
        check_request("/v1/responses", body, max_body_bytes=10_000)
