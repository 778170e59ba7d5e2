"""A simulated answer as server-sent events, in the order the SDK's stream reader insists on."""

import json
import time
from collections.abc import Iterator
from itertools import count

from pydantic import JsonValue

from headrace_shared.testing.answers import Answer, chat_usage, message_item, pieces_of, response_object
from headrace_shared.testing.calls import Call, Endpoint


def events(call: Call, made: Answer) -> list[bytes]:
    """Return the events of an answer to a chat completion or a response, one token each."""
    if call.endpoint is Endpoint.CHAT_COMPLETIONS:
        chunks = [f"data: {json.dumps(chunk)}\n\n".encode() for chunk in _chunks(call, made)]
        return [*chunks, b"data: [DONE]\n\n"]
    numbered = zip(_response_events(call, made), count(), strict=False)
    return [
        f"event: {name}\ndata: {json.dumps({'type': name, 'sequence_number': number, **event})}\n\n".encode()
        for (name, event), number in numbered
    ]


def _chunks(call: Call, made: Answer) -> Iterator[dict[str, JsonValue]]:
    options = call.body.get("stream_options")
    with_usage = isinstance(options, dict) and options.get("include_usage") is True
    common: dict[str, JsonValue] = {
        "id": made.id,
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": call.model,
        "system_fingerprint": "fp_simulated",
        **({"usage": None} if with_usage else {}),
    }

    def chunk(delta: dict[str, JsonValue], finish: str | None = None) -> dict[str, JsonValue]:
        choices = given if isinstance(given := call.body.get("n"), int) else 1
        parts: list[JsonValue] = [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
            for index in range(choices)
        ]
        return {**common, "choices": parts}

    yield chunk({"role": "assistant", "content": "", "refusal": None})
    for piece in pieces_of(made.text):
        yield chunk({"content": piece})
    yield chunk({}, made.finish)
    if with_usage:
        yield {**common, "choices": [], "usage": chat_usage(made.usage)}


def _response_events(call: Call, made: Answer) -> Iterator[tuple[str, dict[str, JsonValue]]]:
    started = response_object(call, made, "in_progress", output=False)
    status = "completed" if made.finish == "stop" else "incomplete"
    item = message_item(made, status)
    place: dict[str, JsonValue] = {"item_id": item["id"], "output_index": 0, "content_index": 0}
    empty: JsonValue = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    full: JsonValue = {"type": "output_text", "text": made.text, "annotations": [], "logprobs": []}
    yield "response.created", {"response": started}
    yield "response.in_progress", {"response": started}
    yield "response.output_item.added", {"output_index": 0, "item": message_item(made, "in_progress")}
    yield "response.content_part.added", {**place, "part": empty}
    for piece in pieces_of(made.text):
        yield "response.output_text.delta", {**place, "delta": piece, "logprobs": []}
    yield "response.output_text.done", {**place, "text": made.text, "logprobs": []}
    yield "response.content_part.done", {**place, "part": full}
    yield "response.output_item.done", {"output_index": 0, "item": item}
    yield f"response.{status}", {"response": response_object(call, made, status)}
