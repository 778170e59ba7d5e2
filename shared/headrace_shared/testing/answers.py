"""The answers of the simulated provider: made from the prompt alone, and saying that they are simulated."""

import base64
import json
import math
import time
from dataclasses import dataclass, replace
from hashlib import shake_256
from itertools import accumulate
from struct import pack
from typing import assert_never

from pydantic import JsonValue

from headrace_shared.hosted_tools import Hosted, HostedTool, ToolCalls
from headrace_shared.testing.books import Usage
from headrace_shared.testing.calls import Call, Endpoint, hash_of


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer, and what it is made of."""

    body: bytes
    usage: Usage
    id: str
    text: str = ""
    finish: str = "stop"
    """The finish reason as chat completions names it: stop, length or content_filter."""
    ran: tuple[JsonValue, ...] = ()
    """The calls of hosted tools."""


def answer(call: Call, number: str, output_tokens: int) -> Answer:
    """Return the answer to a call.

    `number` makes its ids unique; `output_tokens` is the mean length of an answer, which the
    call's own maximum cuts.
    """
    match call.endpoint:
        case Endpoint.CHAT_COMPLETIONS | Endpoint.RESPONSES:
            return _generated(call, number, output_tokens)
        case Endpoint.EMBEDDINGS:
            return _embedded(call, number)
        case Endpoint.MODERATIONS:
            return _moderated(call, number)


def text_of(tokens: int, start: int) -> str:
    """Return a text of so many tokens, each a word; `start` chooses the words after the opening."""
    if tokens <= len(_OPENING):
        return "".join(_OPENING[:tokens])
    laps, rest = divmod(tokens - len(_OPENING), len(_WORDS))
    first = start % len(_WORDS)
    length = laps * len(_LAP) + _OFFSETS[first + rest] - _OFFSETS[first]
    begin = _OFFSETS[first]
    return "".join(_OPENING) + (_LAP * (laps + 2))[begin : begin + length]


def pieces_of(text: str) -> list[str]:
    """Return the tokens of such a text."""
    words = text.split(" ")
    return [words[0], *(f" {word}" for word in words[1:])] if text else []


def response_object(call: Call, made: Answer, status: str, *, output: bool = True) -> dict[str, JsonValue]:
    """Return a Response of the Responses endpoint in one of its states."""
    incomplete = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(made.finish)
    ended = status in {"completed", "incomplete"}
    usage = made.usage
    return {
        "id": made.id,
        "object": "response",
        "created_at": int(time.time()),
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": {"reason": incomplete} if ended and incomplete else None,
        "instructions": call.body.get("instructions"),
        "max_output_tokens": call.max_tokens,
        "model": call.model,
        "output": [*made.ran, message_item(made, "completed" if made.finish == "stop" else "incomplete")]
        if output
        else [],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "metadata": call.body.get("metadata") or {},
        "service_tier": "default",
        **({"tool_usage": {"web_search": {"num_requests": usage.tools.web_searches}}} if made.ran else {}),
        "usage": {
            "input_tokens": usage.prompt,
            "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
            "output_tokens": usage.completion,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.prompt + usage.completion,
        }
        if ended
        else None,
    }


def message_item(made: Answer, status: str) -> dict[str, JsonValue]:
    part: JsonValue = {"type": "output_text", "text": made.text, "annotations": [], "logprobs": []}
    return {
        "type": "message",
        "id": "msg" + made.id.removeprefix("resp"),
        "role": "assistant",
        "status": status,
        "content": [part] if status != "in_progress" else [],
    }


def chat_usage(usage: Usage) -> dict[str, JsonValue]:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


_OPENING = ("This", " answer", " is", " simulated;", " no", " model", " was", " called.")
_WORDS = (
    " water", " wheel", " mill", " channel", " sluice", " gate", " stone", " grain", " river", " weir",
    " pond", " race", " shaft", " gear", " flow", " head", " drop", " turn", " bank", " bridge",
    " stream", " lock", " field", " flour", " wind", " rain", " spring", " valley", " meadow", " oak",
    " iron", " timber",
)  # fmt: skip
_LAP = "".join(_WORDS)
_OFFSETS = list(accumulate((len(word) for word in _WORDS * 2), initial=0))
_FOUND_TOKENS = 500
"""What a hosted tool finds, to be read from then on."""
_CACHEABLE = 1024
"""Prompts from this many tokens on may be served from the cache, in steps of 128."""
_DIMENSIONS = 16
_CATEGORIES = (
    "harassment", "harassment/threatening", "hate", "hate/threatening", "illicit", "illicit/violent",
    "self-harm", "self-harm/instructions", "self-harm/intent", "sexual", "sexual/minors", "violence",
    "violence/graphic",
)  # fmt: skip


def _generated(call: Call, number: str, output_tokens: int) -> Answer:
    seed = int.from_bytes(hash_of(call.prompt))
    tokens = max(1, output_tokens // 2 + seed % (output_tokens + 1))
    finish = "stop"
    if call.max_tokens is not None and tokens > call.max_tokens:
        tokens, finish = call.max_tokens, "length"
    if call.model.startswith("filtered-"):
        tokens, finish = (tokens + 1) // 2, "content_filter"
    text = text_of(tokens, seed >> 32)
    cached = call.prompt_tokens // 256 * 128 if call.prompt_tokens >= _CACHEABLE and seed & 1 else 0
    if call.endpoint is Endpoint.RESPONSES:
        usage = Usage(call.prompt_tokens, tokens, cached)
        ran: tuple[JsonValue, ...] = ()
        if call.hosted is not None:
            ran, usage = _run(call.hosted, usage, seed >> 16)
        draft = Answer(b"", usage, f"resp_{number}", text, finish, ran)
        status = "completed" if finish == "stop" else "incomplete"
        return replace(draft, body=json.dumps(response_object(call, draft, status)).encode())
    choices = count if isinstance(count := call.body.get("n"), int) else 1
    usage = Usage(call.prompt_tokens, tokens * choices, cached)
    draft = Answer(b"", usage, f"chatcmpl-{number}", text, finish)
    return replace(draft, body=_chat_body(call, draft, choices))


def _run(hosted: Hosted, usage: Usage, seed: int) -> tuple[tuple[JsonValue, ...], Usage]:
    """Use the hosted tools in turn, up to as often as is allowed; each brings something more to read."""
    calls = 1 + seed % hosted.calls
    ran: list[JsonValue] = []
    tools, prompt = ToolCalls(), usage.prompt
    for number in range(calls):
        item, charged = _used(hosted.tools[number % len(hosted.tools)], number)
        # One container serves all of them.
        tools += replace(charged, containers=0) if tools.containers else charged
        ran.append(item)
        prompt += usage.prompt + (number + 1) * _FOUND_TOKENS
    return tuple(ran), replace(usage, prompt=prompt, tools=tools)


def _used(tool: HostedTool, number: int) -> tuple[JsonValue, ToolCalls]:
    """Return a call as the answer shows it, and what it is charged as; a page that is opened is free."""
    common: dict[str, JsonValue] = {"id": f"call_{number}", "status": "completed"}
    match tool:
        case HostedTool.WEB_SEARCH | HostedTool.WEB_SEARCH_PREVIEW:
            queries: list[JsonValue] = ["water"] * (1 + number % 2)
            search: JsonValue = {"type": "search", "query": "water", "queries": queries}
            page: JsonValue = {"type": "open_page", "url": "https://example.com"}
            opens = number % 3 == 2  # noqa: PLR2004 - every third one
            item = {**common, "type": "web_search_call", "action": page if opens else search}
            return item, ToolCalls(web_searches=0 if opens else len(queries))
        case HostedTool.FILE_SEARCH:
            file_search: JsonValue = {**common, "type": "file_search_call", "queries": ["water"]}
            return file_search, ToolCalls(file_searches=1)
        case HostedTool.CODE_INTERPRETER:
            item = {**common, "type": "code_interpreter_call", "container_id": "cntr_simulated"}
            return item, ToolCalls(containers=1)
        case _:
            assert_never(tool)


def _chat_body(call: Call, made: Answer, choices: int) -> bytes:
    message: JsonValue = {"role": "assistant", "content": made.text, "refusal": None, "annotations": []}
    completion: JsonValue = {
        "id": made.id,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": call.model,
        "choices": [
            {"index": index, "message": message, "logprobs": None, "finish_reason": made.finish}
            for index in range(choices)
        ],
        "usage": chat_usage(made.usage),
        "service_tier": "default",
        "system_fingerprint": "fp_simulated",
    }
    return json.dumps(completion).encode()


def _embedded(call: Call, number: str) -> Answer:
    size = given if isinstance(given := call.body.get("dimensions"), int) else _DIMENSIONS
    in_base64 = call.body.get("encoding_format") == "base64"
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(vector) if in_base64 else vector}
        for index, vector in enumerate(_vector(item, size) for item in _inputs(call.body.get("input")))
    ]
    tokens = call.prompt_tokens
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    body = {"object": "list", "data": data, "model": call.model, "usage": usage}
    return Answer(json.dumps(body).encode(), Usage(tokens), f"embd-{number}")


def _inputs(value: JsonValue) -> list[JsonValue]:
    """Return the single inputs: a text, a list of token ids, or a list of either."""
    if isinstance(value, list) and not (value and isinstance(value[0], int)):
        return value
    return [value]


def _vector(item: JsonValue, size: int) -> list[float]:
    """Return a vector of length 1 that depends on the input alone."""
    noise = shake_256(json.dumps(item).encode()).digest(size * 2)
    raw = [int.from_bytes(noise[at : at + 2]) / 32768 - 1 for at in range(0, size * 2, 2)]
    norm = math.sqrt(sum(value * value for value in raw)) or 1.0
    return [round(value / norm, 7) for value in raw]


def _encoded(vector: list[float]) -> str:
    return base64.b64encode(pack(f"<{len(vector)}f", *vector)).decode()


def _moderated(call: Call, number: str) -> Answer:
    result: JsonValue = {
        "flagged": False,
        "categories": dict.fromkeys(_CATEGORIES, False),
        "category_scores": dict.fromkeys(_CATEGORIES, 0.00001),
        "category_applied_input_types": {category: ["text"] for category in _CATEGORIES},
    }
    inputs = call.body.get("input")
    texts = isinstance(inputs, list) and all(isinstance(item, str) for item in inputs)
    results = [result] * (len(inputs) if texts and isinstance(inputs, list) else 1)
    body = {"id": f"modr-{number}", "model": call.model, "results": results}
    return Answer(json.dumps(body).encode(), Usage(0), f"modr-{number}")
