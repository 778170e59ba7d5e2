import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace_shared.request import ENDPOINTS, Endpoint
from headrace_shared.usage import NO_USAGE, Finish, Usage, read_answer, read_finish, read_usage

CHAT, RESPONSES, EMBEDDINGS, MODERATIONS = ENDPOINTS


def chat(usage: object, *choices: dict[str, object]) -> bytes:
    default = {"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}
    return json.dumps({"choices": choices or (default,), "usage": usage}).encode()


def choice(reason: str, **message: object) -> dict[str, object]:
    return {"finish_reason": reason, "message": message}


def test_the_usage_of_a_chat() -> None:
    usage = {
        "prompt_tokens": 30,
        "prompt_tokens_details": {"cached_tokens": 10, "cache_write_tokens": 5, "audio_tokens": 0},
        "completion_tokens": 20,
        "completion_tokens_details": {"reasoning_tokens": 8},
        "total_tokens": 50,
    }
    answer = read_answer(CHAT, chat(usage))
    assert answer is not None
    assert answer.usage == Usage(30, 10, 20, 8, 5)
    assert Usage(30, 10, 20, 8, 5).total_tokens == 50
    assert (answer.finish, answer.detail) == (Finish.COMPLETE, "stop")


def test_the_usage_of_a_response() -> None:
    usage = {
        "input_tokens": 30,
        "input_tokens_details": {"cached_tokens": 10},
        "output_tokens": 20,
        "output_tokens_details": {"reasoning_tokens": 8},
        "total_tokens": 50,
    }
    body = json.dumps({"status": "completed", "output": [], "error": None, "usage": usage}).encode()
    assert read_usage(RESPONSES, body) == Usage(30, 10, 20, 8)


def test_the_usage_of_embeddings_and_moderations() -> None:
    usage = {"prompt_tokens": 8, "total_tokens": 8}
    body = json.dumps({"object": "list", "data": [{"embedding": [0.1, 0.2]}], "usage": usage}).encode()
    assert read_usage(EMBEDDINGS, body) == Usage(8, 0, 0, 0)
    assert read_usage(MODERATIONS, b'{"results": [{"flagged": false}]}') == NO_USAGE
    assert read_answer(MODERATIONS, b"{}") is None


def test_reasoning_that_only_the_total_counts_is_paid_for() -> None:
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 115}
    assert read_usage(CHAT, chat(usage)) == Usage(10, 0, 105, 0)


@pytest.mark.parametrize(
    "usage",
    [
        None,
        "many",
        {},
        {"prompt_tokens": 1},
        {"prompt_tokens": -1, "completion_tokens": 1},
        {"prompt_tokens": 1.5, "completion_tokens": 1},
        {"prompt_tokens": "1", "completion_tokens": 1},
        {"prompt_tokens": True, "completion_tokens": 1},
        {"prompt_tokens": 10**30, "completion_tokens": 1},
        {"prompt_tokens": 1, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 2}},
        {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": -2},
    ],
)
def test_an_incredible_usage_is_none_but_the_answer_is_kept(usage: object) -> None:
    answer = read_answer(CHAT, chat(usage))
    assert answer is not None
    assert answer.usage is None
    assert answer.finish is Finish.COMPLETE


@pytest.mark.parametrize(
    ("body", "finish"),
    [
        (chat({}, choice("content_filter")), Finish.CONTENT_FILTER),
        (chat({}, choice("content_filter"), choice("stop")), Finish.COMPLETE),
        (chat({}, choice("length")), Finish.LENGTH),
        (chat({}, choice("tool_calls")), Finish.COMPLETE),
        (b'{"error": {"code": "oops", "message": "no"}}', Finish.FAILED),
        (b'{"choices": []}', None),
        (b"{}", None),
        (b"[1]", None),
        (b"<html>", None),
        (b"", None),
        (b'{"choices": ' + b"[" * 100_000, None),
    ],
)
def test_how_a_chat_ended(body: bytes, finish: Finish | None) -> None:
    assert read_finish(CHAT, body) is finish


@pytest.mark.parametrize(
    ("body", "finish", "detail"),
    [
        ({"status": "completed"}, Finish.COMPLETE, "completed"),
        (
            {"status": "incomplete", "incomplete_details": {"reason": "content_filter"}},
            Finish.CONTENT_FILTER,
            "content_filter",
        ),
        (
            {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}},
            Finish.LENGTH,
            "max_output_tokens",
        ),
        (
            {"status": "failed", "error": {"code": "server_error", "message": "Sorry"}},
            Finish.FAILED,
            "server_error: Sorry",
        ),
    ],
)
def test_how_a_response_ended(body: dict[str, object], finish: Finish, detail: str) -> None:
    answer = read_answer(RESPONSES, json.dumps(body).encode())
    assert answer is not None
    assert (answer.finish, answer.detail) == (finish, detail)


def test_a_response_that_has_not_ended_is_no_answer() -> None:
    assert read_answer(RESPONSES, b'{"status": "in_progress", "error": null}') is None


def test_a_refusal_is_told() -> None:
    answer = read_answer(CHAT, chat({}, choice("stop", refusal="I cannot")))
    assert answer is not None
    assert answer.refusal == "I cannot"
    output = [{"type": "message", "content": [{"type": "refusal", "refusal": "No"}]}]
    answer = read_answer(RESPONSES, json.dumps({"status": "completed", "output": output}).encode())
    assert answer is not None
    assert answer.refusal == "No"


def test_half_a_surrogate_pair_does_not_lose_the_usage() -> None:
    body = chat({"prompt_tokens": 1, "completion_tokens": 2}, choice("stop", content="\ud800"))
    assert b"\\ud800" in body
    assert read_usage(CHAT, body) == Usage(1, 0, 2, 0)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(["choices", "usage", "status", "error", "output", "incomplete_details", "results"])


@given(endpoint=st.sampled_from(ENDPOINTS), body=st.dictionaries(FIELDS, JSON), noise=st.binary(max_size=30))
def test_foreign_bytes_never_raise(endpoint: Endpoint, body: dict[str, object], noise: bytes) -> None:
    read_answer(endpoint, json.dumps(body).encode())
    read_answer(endpoint, noise)
