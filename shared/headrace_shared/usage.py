"""What a provider answered: how many tokens it counted, and how the answer ended.

Nothing here raises: an answer is foreign bytes, and what cannot be read is None,
which the ledger books as suspense.
"""

import json
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple, TypeGuard, assert_never

from pydantic import BaseModel, ConfigDict, ValidationError

from headrace_shared.hosted_tools import NO_TOOLS, ToolCalls
from headrace_shared.jsonvalue import is_table
from headrace_shared.request_bounds import Endpoint


@dataclass(frozen=True, slots=True)
class Usage:
    """The tokens of one answered call; those read from and written to a cache are part of the prompt's."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    """Part of the completion's."""
    cache_write_tokens: int = 0
    tools: ToolCalls = NO_TOOLS
    """What the provider ran meanwhile, as it charges it; not kept apart in the ledger, whose cost has it."""

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            reasoning_tokens=self.reasoning_tokens + other.reasoning_tokens,
            cache_write_tokens=self.cache_write_tokens + other.cache_write_tokens,
            tools=self.tools + other.tools,
        )


MAX_TOKENS = 10**9
"""More tokens than any call has: a larger count is noise."""

NO_USAGE = Usage(prompt_tokens=0, cached_tokens=0, completion_tokens=0, reasoning_tokens=0)


_UNCHARGED_ACTIONS = ("open_page", "find_in_page", "find")
"""Of a web search: what it reads counts as tokens alone."""


class Finish(StrEnum):
    """How an answer ended."""

    COMPLETE = "complete"
    LENGTH = "length"
    """Cut at the maximum of output tokens."""
    CONTENT_FILTER = "content_filter"
    FAILED = "failed"
    """A 2xx whose body reports an error."""


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """What one reading of a provider's 2xx body found."""

    usage: Usage | None
    """None: it is an answer, but says nothing credible about its tokens."""
    finish: Finish
    detail: str = ""
    """The provider's own finish reason, or its error's code and message."""
    refusal: str | None = None
    """The text with which the model declined, where it did."""


def read_answer(endpoint: Endpoint, answer: bytes) -> ParsedAnswer | None:
    """Read the body of a 2xx once; None where it is no answer of that endpoint."""
    body = _parse(answer)
    ending = None if body is None else _read_ending(endpoint, body)
    if body is None or ending is None:
        return None
    return ParsedAnswer(_read_usage(endpoint, body), ending.finish, ending.detail, ending.refusal)


def read_usage(endpoint: Endpoint, answer: bytes) -> Usage | None:
    """Return the tokens an answer reports; zeros for moderations, None where they cannot be read."""
    found = read_answer(endpoint, answer)
    return found.usage if found else None


def read_finish(endpoint: Endpoint, answer: bytes) -> Finish | None:
    """Return how an answer ended; None where it is no answer of that endpoint."""
    found = read_answer(endpoint, answer)
    return found.finish if found else None


class _Ending(NamedTuple):
    finish: Finish
    detail: str = ""
    refusal: str | None = None


class _Body(BaseModel):
    """The few fields that are looked at: the rest, such as embeddings, is never built."""

    model_config = ConfigDict(extra="ignore")

    choices: object = None
    error: object = None
    incomplete_details: object = None
    output: object = None
    results: object = None
    status: object = None
    tool_usage: object = None
    usage: object = None


def _parse(answer: bytes) -> _Body | None:
    try:
        return _Body.model_validate_json(answer)
    except ValidationError:
        pass
    # A half surrogate pair in a text is no reason to lose the usage: the standard reader lets it pass.
    try:
        return _Body.model_validate(json.loads(answer))
    except (ValueError, RecursionError):
        return None


def _read_usage(endpoint: Endpoint, body: _Body) -> Usage | None:
    match endpoint:
        case Endpoint.CHAT_COMPLETIONS:
            return _usage_of(body.usage, "prompt_tokens", "completion_tokens")
        case Endpoint.RESPONSES:
            usage = _usage_of(body.usage, "input_tokens", "output_tokens")
            calls = _tool_calls(body)
            return replace(usage, tools=calls) if usage and calls != NO_TOOLS else usage
        case Endpoint.EMBEDDINGS:
            prompt = _count(_table(body.usage), "prompt_tokens", None)
            return None if prompt is None else Usage(prompt, 0, 0, 0)
        case Endpoint.MODERATIONS:
            return NO_USAGE
        case _:
            assert_never(endpoint)


def _usage_of(reported: object, prompt_name: str, completion_name: str) -> Usage | None:
    usage = _table(reported)
    of_prompt = _table(usage.get(f"{prompt_name}_details"))
    of_completion = _table(usage.get(f"{completion_name}_details"))
    prompt = _count(usage, prompt_name, None)
    completion = _count(usage, completion_name, None)
    cached = _count(of_prompt, "cached_tokens", 0)
    written = _count(of_prompt, "cache_write_tokens", 0)
    reasoning = _count(of_completion, "reasoning_tokens", 0)
    if prompt is None or completion is None or cached is None or written is None or reasoning is None:
        return None
    if cached + written > prompt:
        return None
    total = _count(usage, "total_tokens", 0)
    if total is None:
        return None
    # Some providers leave reasoning out of the completion, but never out of the total, nor of the bill.
    return Usage(prompt, cached, max(completion, total - prompt), reasoning, written)


def _tool_calls(body: _Body) -> ToolCalls:
    """Count what the provider ran; of web searches it says itself which of them it charges."""
    searches = files = 0
    containers = set[str]()
    for place, item in enumerate(_tables(body.output)):
        match item.get("type"):
            case "web_search_call":
                searches += _searches(_table(item.get("action")))
            case "file_search_call":
                files += 1
            case "code_interpreter_call":
                containers.add(_text(item.get("container_id")) or str(place))
            case _:
                pass
    charged = _count(_table(_table(body.tool_usage).get("web_search")), "num_requests", searches)
    return ToolCalls(searches if charged is None else charged, files, len(containers))


def _searches(action: dict[str, object]) -> int:
    if action.get("type") in _UNCHARGED_ACTIONS:
        return 0
    queries = action.get("queries")
    return max(1, len(queries)) if _is_list(queries) else 1


def _read_ending(endpoint: Endpoint, body: _Body) -> _Ending | None:
    if body.error is not None and endpoint is not Endpoint.RESPONSES:
        return _Ending(Finish.FAILED, _describe(body.error))
    match endpoint:
        case Endpoint.CHAT_COMPLETIONS:
            return _ending_of_choices(body.choices)
        case Endpoint.RESPONSES:
            return _ending_of_response(body)
        case Endpoint.EMBEDDINGS:
            return _Ending(Finish.COMPLETE) if is_table(body.usage) else None
        case Endpoint.MODERATIONS:
            return _Ending(Finish.COMPLETE) if _is_list(body.results) else None
        case _:
            assert_never(endpoint)


def _ending_of_choices(reported: object) -> _Ending | None:
    choices = _tables(reported)
    if not choices:
        return None
    reasons = [_text(choice.get("finish_reason")) for choice in choices]
    refusals = (_text(_table(choice.get("message")).get("refusal")) for choice in choices)
    refusal = next(filter(None, refusals), None)
    if all(reason == "content_filter" for reason in reasons):
        return _Ending(Finish.CONTENT_FILTER, "content_filter", refusal)
    if "length" in reasons:
        return _Ending(Finish.LENGTH, "length", refusal)
    return _Ending(Finish.COMPLETE, reasons[0], refusal)


def _ending_of_response(body: _Body) -> _Ending | None:
    refusal = _refusal_of(body.output)
    match body.status:
        case "completed":
            return _Ending(Finish.COMPLETE, "completed", refusal)
        case "incomplete":
            reason = _text(_table(body.incomplete_details).get("reason"))
            filtered = reason == "content_filter"
            return _Ending(
                Finish.CONTENT_FILTER if filtered else Finish.LENGTH, reason or "incomplete", refusal
            )
        case "failed" | "cancelled":
            return _Ending(Finish.FAILED, _describe(body.error) or str(body.status), refusal)
        case _:
            return _Ending(Finish.FAILED, _describe(body.error)) if body.error is not None else None


def _refusal_of(output: object) -> str | None:
    parts = (part for item in _tables(output) for part in _tables(item.get("content")))
    return next((_text(part.get("refusal")) for part in parts if part.get("type") == "refusal"), None)


def _describe(error: object) -> str:
    if not is_table(error):
        return _text(error)
    parts = (_text(error.get("code")), _text(error.get("message")))
    return ": ".join(filter(None, parts)) or "error"


def _count(table: dict[str, object], name: str, default: int | None) -> int | None:
    """Return a token count: ``default`` where it is absent, None where it is not credible."""
    value = table.get(name)
    if value is None:
        return default
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_TOKENS
    return value if isinstance(value, int) and is_count else None


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _is_list(value: object) -> TypeGuard[list[object]]:
    return isinstance(value, list)


def _table(value: object) -> dict[str, object]:
    return value if is_table(value) else {}


def _tables(value: object) -> list[dict[str, object]]:
    return [item for item in value if is_table(item)] if _is_list(value) else []
