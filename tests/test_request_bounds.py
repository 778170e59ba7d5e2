from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace_shared.errors import InvalidRequest
from headrace_shared.request import CheckedRequest, check_request, prepare
from headrace_shared.request_bounds import FILE_TOKENS, FRAMING_TOKENS, IMAGE_TOKENS

CHAT = "/v1/chat/completions"
FUNCTION = {"type": "function", "name": "look_up"}
MESSAGES = [{"role": "user", "content": "Hello"}]


def check(endpoint: str, body: Mapping[str, object] | bytes | str) -> CheckedRequest:
    return check_request(endpoint, body, max_body_bytes=1_000_000)


def chat(**fields: object) -> dict[str, object]:
    return {"model": "gpt-4o-mini", "messages": MESSAGES, **fields}


def respond(**fields: object) -> dict[str, object]:
    return {"model": "gpt-4o-mini", "input": "Hello", **fields}


def parts(*content: object) -> dict[str, object]:
    return chat(messages=[{"role": "user", "content": list(content)}])


@pytest.mark.parametrize(
    ("endpoint", "body", "field"),
    [
        ("/v1/responses", respond(previous_response_id="resp_1"), "previous_response_id"),
        ("/v1/responses", respond(conversation="conv_1"), "conversation"),
        ("/v1/responses", respond(prompt={"id": "pmpt_1"}), "prompt"),
        ("/v1/responses", respond(tools=[{"type": "web_search"}]), "max_tool_calls"),
        *[
            ("/v1/responses", respond(max_tool_calls=1, tools=[FUNCTION, {"type": kind}]), "tools[1].type")
            for kind in ("image_generation", "computer_use_preview", "mcp", "shell", "local_shell", None)
        ],
        *[
            (
                "/v1/responses",
                respond(max_tool_calls=1, tools=[{"type": "code_interpreter", "container": container}]),
                f"tools[0].container{field}",
            )
            for container, field in (
                ("cntr_1", ""),
                ({"type": "auto", "memory_limit": "64g"}, ".memory_limit"),
            )
        ],
        (CHAT, chat(max_tool_calls=1, tools=[{"type": "web_search"}]), "tools[0].type"),
        ("/v1/responses", respond(input=[{"type": "item_reference", "id": "x"}]), "input[0].type"),
        *[
            ("/v1/responses", respond(input=[{"id": "x_1", **item}]), "input[0]")
            for item in (
                {},
                {"type": None},
                {"type": "message"},
                {"type": "function_call", "name": "f"},
                {"type": "function_call_output"},
                {"type": "reasoning", "encrypted_content": ""},
                {"type": "reasoning", "encrypted_content": 1},
            )
        ],
        (
            "/v1/responses",
            respond(input=[{"role": "user", "content": [{"type": "input_file", "file_id": "file-1"}]}]),
            "input[0].content[0].file_id",
        ),
        (CHAT, parts({"type": "file", "file": {"file_id": "file-1"}}), "messages[0].content[0].file_id"),
        (CHAT, parts({"type": "input_audio", "input_audio": {}}), "messages[0].content[0].type"),
        (CHAT, parts({"type": ["text"]}), "messages[0].content[0].type"),
        (CHAT, chat(modalities=["text", "audio"]), "modalities"),
        (CHAT, chat(web_search_options={}), "web_search_options"),
        (CHAT, chat(service_tier="priority"), "service_tier"),
        (CHAT, chat(service_tier=["flex"]), "service_tier"),
    ],
)
def test_what_no_budget_can_bound_is_refused(endpoint: str, body: Mapping[str, object], field: str) -> None:
    with pytest.raises(InvalidRequest, match="cannot be bounded under a hard budget") as refused:
        check(endpoint, body)
    assert refused.value.field == field


def bound(endpoint: str, body: Mapping[str, object]) -> int:
    checked = check(endpoint, body)
    return prepare(checked.body, checked.endpoint, checked.model, 100).input_bound


def test_attachments_count_by_kind_and_not_by_their_bytes() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 90_000}}
    assert IMAGE_TOKENS * 2 < bound(CHAT, parts(image, image)) < IMAGE_TOKENS * 2 + 1_000
    pdf = {"type": "input_file", "file_url": "https://example.com/a.pdf"}
    items = [{"role": "user", "content": [pdf, pdf]}]
    assert FILE_TOKENS < bound("/v1/responses", respond(input=items)) < FILE_TOKENS + 1_000


def test_token_ids_are_counted() -> None:
    assert bound("/v1/embeddings", respond(input=[[100_000, 7], [8]])) == FRAMING_TOKENS + 3
    assert bound("/v1/embeddings", respond(input=[100_000] * 5)) == FRAMING_TOKENS + 5


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=200))
def test_the_bound_is_at_least_the_bytes_of_every_text(text: str) -> None:
    assert bound(CHAT, chat(messages=[{"role": "user", "content": text}])) >= len(text.encode()) + 4
    assert bound("/v1/embeddings", respond(input=[text or "x"])) >= len(text.encode())
