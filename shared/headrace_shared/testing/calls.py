"""A request to the simulated provider, read and checked as the real wire would."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from hashlib import blake2b

from pydantic import JsonValue
from pydantic_core import from_json

from headrace_shared.hosted_tools import HOSTED_TOOLS, Hosted, HostedTool


class Endpoint(StrEnum):
    CHAT_COMPLETIONS = "/v1/chat/completions"
    RESPONSES = "/v1/responses"
    EMBEDDINGS = "/v1/embeddings"
    MODERATIONS = "/v1/moderations"


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error answer in OpenAI's shape."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None

    @property
    def body(self) -> bytes:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()


@dataclass(frozen=True, slots=True)
class Call:
    """A request that is in order."""

    endpoint: Endpoint
    model: str
    body: dict[str, JsonValue]
    prompt: bytes
    """The UTF-8 of every text in the prompt, with a zero byte between two."""
    prompt_tokens: int
    """A plausible count, never more than the bytes of the request's body."""
    max_tokens: int | None
    hosted: Hosted | None = None
    """The tools that the provider may run for it."""

    @property
    def stream(self) -> bool:
        streams = self.endpoint in {Endpoint.CHAT_COMPLETIONS, Endpoint.RESPONSES}
        return streams and self.body.get("stream") is True


def read(endpoint: Endpoint, raw: bytes) -> Call | Refusal:
    """Return the call that a request's body makes, or the 400 or 404 that it earns."""
    try:
        body: JsonValue = from_json(raw)
    except ValueError:
        return Refusal(400, "The body of the request is not valid JSON.")
    if not isinstance(body, dict):
        return Refusal(400, "The body of the request is not a JSON object.")
    model = body.get("model", "omni-moderation-latest" if endpoint is Endpoint.MODERATIONS else None)
    if not isinstance(model, str) or not model:
        return Refusal(400, "You must provide a model parameter.", param="model")
    refusal = _refused_model(model) or _wrong_field(endpoint, body)
    if refusal is not None:
        return refusal
    texts = list(_texts(body.get(_PROMPTS[endpoint])))
    if endpoint is Endpoint.RESPONSES:
        texts.extend(_texts(body.get("instructions")))
    prompt = b"\0".join(text.encode() for text in texts)
    tokens = min(len(raw), _plausible_tokens(endpoint, body, prompt))
    hosted = _hosted(body) if endpoint is Endpoint.RESPONSES else None
    return Call(endpoint, model, body, prompt, tokens, _max_tokens(endpoint, body), hosted)


def prompt_hash(*texts: str) -> str:
    """Return the name under which the books log a prompt made of these texts."""
    return hash_of(b"\0".join(text.encode() for text in texts)).hex()


def hash_of(prompt: bytes) -> bytes:
    return blake2b(prompt, digest_size=8).digest()


_PROMPTS = {
    Endpoint.CHAT_COMPLETIONS: "messages",
    Endpoint.RESPONSES: "input",
    Endpoint.EMBEDDINGS: "input",
    Endpoint.MODERATIONS: "input",
}
_LIMITS = {
    Endpoint.CHAT_COMPLETIONS: ("max_completion_tokens", "max_tokens"),
    Endpoint.RESPONSES: ("max_output_tokens",),
    Endpoint.EMBEDDINGS: (),
    Endpoint.MODERATIONS: (),
}
_MAX_CHOICES = 128
_MAX_DIMENSIONS = 4096


def _refused_model(model: str) -> Refusal | None:
    if model.startswith("missing-"):
        return unknown_model(model)
    if model.startswith("quota-"):
        message = "You exceeded your current quota (simulated)."
        return Refusal(429, message, type="insufficient_quota", code="insufficient_quota")
    if model.startswith("refused-"):
        return Refusal(
            400, "The prompt was refused by the content filter (simulated).", code="content_filter"
        )
    return None


def unknown_model(model: str) -> Refusal:
    return Refusal(404, f"The model '{model}' does not exist.", param="model", code="model_not_found")


def _wrong_field(endpoint: Endpoint, body: dict[str, JsonValue]) -> Refusal | None:
    name = _PROMPTS[endpoint]
    prompt = body.get(name)
    if not prompt or not isinstance(prompt, list | str) or (name == "messages" and isinstance(prompt, str)):
        return Refusal(
            400, f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter"
        )
    if endpoint is Endpoint.RESPONSES and body.get("background") is True:
        return Refusal(400, "The simulated provider has no background mode.", param="background")
    for name, most in (
        *((name, None) for name in _LIMITS[endpoint]),
        ("n", _MAX_CHOICES),
        ("dimensions", _MAX_DIMENSIONS),
    ):
        value = body.get(name)
        if value is not None and not _is_count(value, most):
            return Refusal(
                400,
                f"Invalid '{name}': it must be an integer of at least 1"
                f"{f' and at most {most}' if most else ''}.",
                param=name,
                code="integer_below_min_value",
            )
    return None


def _is_count(value: JsonValue, most: int | None) -> bool:
    return (
        isinstance(value, int)
        and not isinstance(value, bool)
        and value >= 1
        and (most is None or value <= most)
    )


def _hosted(body: dict[str, JsonValue]) -> Hosted | None:
    """Read the tools that this provider has; without a bound of their calls there is one call."""
    tools = given if isinstance(given := body.get("tools"), list) else []
    kinds = {HOSTED_TOOLS.get(tool.get("type")) for tool in tools if isinstance(tool, dict)}
    most = count if isinstance(count := body.get("max_tool_calls"), int) else 1
    found = tuple(tool for tool in HostedTool if tool in kinds)
    return Hosted(found, most) if found else None


def _max_tokens(endpoint: Endpoint, body: dict[str, JsonValue]) -> int | None:
    given = [value for name in _LIMITS[endpoint] if isinstance(value := body.get(name), int)]
    return min(given, default=None)


def _texts(value: JsonValue) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        yield from _texts(value.get("content"))
        yield from _texts(value.get("text"))


def _plausible_tokens(endpoint: Endpoint, body: dict[str, JsonValue], prompt: bytes) -> int:
    value = body.get(_PROMPTS[endpoint])
    tokens = (len(prompt) + 3) // 4
    if isinstance(value, list):
        framed = endpoint in {Endpoint.CHAT_COMPLETIONS, Endpoint.RESPONSES}
        tokens += 3 + 4 * len(value) if framed else sum(_token_ids(item) for item in value)
    return max(1, tokens)


def _token_ids(value: JsonValue) -> int:
    if isinstance(value, list):
        return len(value)
    return 1 if isinstance(value, int) else 0
