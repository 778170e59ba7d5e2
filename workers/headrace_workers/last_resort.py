"""A route's own answer, given where no target has given one, and marked as such.

It has the form of the endpoint that was asked, names `static/<route>` as its model, and stands in
the ledger as a call to the provider `static` that cost nothing.
"""

from typing import assert_never

from headrace_shared.ids import RouteName
from headrace_shared.job import ClaimedJob
from headrace_shared.jsonvalue import JsonObject, write_json
from headrace_shared.prices import Price, PriceStep
from headrace_shared.request import Endpoint, PreparedRequest
from headrace_shared.routes import STATIC_PROVIDER, Target

NO_REQUEST = PreparedRequest(body=b"", input_bound=0, output_bound=0)


def static_target(route: RouteName) -> Target:
    return Target(STATIC_PROVIDER, route)


def no_price(target: Target) -> Price:
    return Price(target, STATIC_PROVIDER, 0, (PriceStep(-1, 0, 0, 0, 0),))


def static_answer(endpoint: Endpoint, text: str, route: RouteName, job: ClaimedJob) -> bytes | None:
    """Return the answer's body; None where a text answers nothing."""
    match endpoint:
        case Endpoint.CHAT_COMPLETIONS:
            return write_json(_completion(text, route, job))
        case Endpoint.RESPONSES:
            return write_json(_response(text, route, job))
        case Endpoint.EMBEDDINGS | Endpoint.MODERATIONS:
            return None
        case _:
            assert_never(endpoint)


def _completion(text: str, route: RouteName, job: ClaimedJob) -> JsonObject:
    message: JsonObject = {"role": "assistant", "content": text, "refusal": None}
    return {
        "id": f"chatcmpl-static-{job.id}",
        "object": "chat.completion",
        "created": int(job.created_at.timestamp()),
        "model": str(static_target(route)),
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
    }


def _response(text: str, route: RouteName, job: ClaimedJob) -> JsonObject:
    part: JsonObject = {"type": "output_text", "text": text, "annotations": []}
    return {
        "id": f"resp_static_{job.id.hex}",
        "object": "response",
        "created_at": int(job.created_at.timestamp()),
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "model": str(static_target(route)),
        "output": [
            {
                "type": "message",
                "id": f"msg_static_{job.id.hex}",
                "role": "assistant",
                "status": "completed",
                "content": [part],
            }
        ],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": {
            "input_tokens": 0,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": 0,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 0,
        },
    }
