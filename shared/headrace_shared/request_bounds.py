"""How many tokens a request can cost at most, found without a tokenizer, or closer with one.

Byte-level vocabularies make at most one token of a byte, so the UTF-8 bytes of the
JSON body bound the tokens of all text in it, the chat template's included. Where the
vocabulary of the model is at hand, the texts that it reads in one piece count as their
tokens instead. What the body only points at is bounded by a constant; what nothing
bounds is refused, for a hold on it would be a guess.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never

from headrace_shared.errors import InvalidRequest
from headrace_shared.hosted_tools import HOSTED_TOOLS, MAX_TOOL_CALLS, WEB_SEARCHES, Hosted, HostedTool
from headrace_shared.jsonvalue import Json, JsonObject
from headrace_shared.vocabularies import Counted


class Endpoint(StrEnum):
    """What a job may ask for: the paths of the provider's API."""

    CHAT_COMPLETIONS = "/v1/chat/completions"
    RESPONSES = "/v1/responses"
    EMBEDDINGS = "/v1/embeddings"
    MODERATIONS = "/v1/moderations"


WITHOUT_OUTPUT = (Endpoint.EMBEDDINGS, Endpoint.MODERATIONS)
"""No token is written in answer."""

FRAMING_TOKENS = 128
"""What a provider adds to a prompt of its own: roles, the date, a hidden preamble."""

SCHEMA_TOKENS = 512
"""What it adds once where tools or an output schema are given, beside their own bytes."""

IMAGE_TOKENS = 50_000
"""One image at any size and detail: the dearest known is gpt-4o-mini at 2,833 + 8 * 5,667 = 48,169."""

FILE_TOKENS = 2_097_152
"""All files of a request: no model priced today reads a longer context, and a longer one is refused."""

MAX_CHOICES = 128

_SERVICE_TIERS = ("auto", "default", "flex")
_CLIENT_TOOLS = ("function", "custom")
_TEXT_PARTS = ("text", "refusal", "input_text", "output_text", "summary_text", "reasoning_text")
_IMAGE_PARTS = ("image_url", "input_image")
_FILE_PARTS = ("file", "input_file")
_OWN_CONTENT = {
    "message": "content",
    "function_call": "arguments",
    "custom_tool_call": "input",
    "function_call_output": "output",
    "custom_tool_call_output": "output",
    "reasoning": "encrypted_content",
}
_WITH_SCHEMA = ("tools", "functions", "response_format", "text")

_UNBOUNDED_FIELDS = {
    Endpoint.CHAT_COMPLETIONS: ("audio", "prediction", "web_search_options"),
    Endpoint.RESPONSES: ("previous_response_id", "conversation", "prompt", "context_management"),
    Endpoint.EMBEDDINGS: (),
    Endpoint.MODERATIONS: (),
}


@dataclass(slots=True)
class _Measure:
    """What is in a request beside its text."""

    images: int = 0
    files: int = 0
    embedded_characters: int = 0
    """Data URLs: bytes of the body that are no text."""
    texts: Counted | None = None
    """Counts the texts of messages; None: their bytes have to do."""

    def add_text(self, text: Json) -> None:
        if self.texts is not None and isinstance(text, str):
            self.texts.add(text)

    @property
    def saved(self) -> int:
        return 0 if self.texts is None else self.texts.saved


@dataclass(frozen=True, slots=True)
class Bounds:
    """The most tokens of a request, however large its body and the default maximum turn out to be."""

    counts_bytes: bool
    """Each byte of the body may be a token."""
    beside: int
    """Input tokens beside those; less than none where bytes of the body are no text."""
    answers: int
    """So many outputs, each at most as long as `maximum`; none where nothing is written in answer."""
    maximum: int | None
    """None where the request names none."""
    hosted: Hosted | None = None
    """Tools that the provider runs; with them the input is read again and again."""

    def input(self, size: int) -> int:
        """Return the most input tokens that a body of so many bytes can cost."""
        return self.beside + size if self.counts_bytes else self.beside

    def output(self, default: int) -> int:
        """Return the most output tokens, ``default`` standing for a maximum that it does not name."""
        return self.answers * (default if self.maximum is None else self.maximum)


def check_bounded(endpoint: Endpoint, document: JsonObject) -> Bounds:
    """Return how a request is bounded, and refuse one whose cost has no upper bound.

    Raises:
        InvalidRequest: names the part, and says that a hard budget cannot bound it.

    """
    for name in _UNBOUNDED_FIELDS[endpoint]:
        if document.get(name) is not None:
            raise _unbounded(name)
    tier = document.get("service_tier")
    if tier is not None and tier not in _SERVICE_TIERS:
        raise InvalidRequest(
            field="service_tier",
            reason="is charged above the standard price, which cannot be bounded under a hard budget: "
            "use auto, default or flex",
        )
    _check_modalities(document.get("modalities"))
    _check_tools(endpoint, document.get("tools"))
    return bounds_of(endpoint, document)


def bounds_of(endpoint: Endpoint, document: JsonObject, texts: Counted | None = None) -> Bounds:
    """Return the bounds of a request that was checked, in which only numbers and attachments may be wrong.

    Args:
        endpoint: what is asked.
        document: the request.
        texts: counts its texts, in the vocabulary of the model that is called; the bounds hold for no other.

    Raises:
        InvalidRequest: a part cannot be bounded, or a maximum or the number of choices is no positive
            whole number.

    """
    answers, maximum = _outputs(endpoint, document)
    measure = _Measure(texts=texts)
    token_ids = _measure_prompt(endpoint, document, measure)
    beside = FRAMING_TOKENS - measure.embedded_characters - measure.saved + measure.images * IMAGE_TOKENS
    if measure.files:
        beside += FILE_TOKENS
    if endpoint is Endpoint.EMBEDDINGS:
        return Bounds(token_ids is None, beside + (token_ids or 0), answers, maximum)
    if any([document.get(name) is not None for name in _WITH_SCHEMA]):  # noqa: C419 - quicker than a generator
        beside += SCHEMA_TOKENS
    hosted = _hosted(document) if endpoint is Endpoint.RESPONSES else None
    return Bounds(counts_bytes=True, beside=beside, answers=answers, maximum=maximum, hosted=hosted)


def _measure_prompt(endpoint: Endpoint, document: JsonObject, measure: _Measure) -> int | None:
    """Go through what is read once; return how many token ids it is, where it is those."""
    match endpoint:
        case Endpoint.CHAT_COMPLETIONS:
            messages = document.get("messages")
            if measure.texts is not None or not _is_text(messages):
                for place, message in _objects(messages, "messages"):
                    _measure_message(message, place, measure)
        case Endpoint.RESPONSES | Endpoint.MODERATIONS:
            measure.add_text(document.get("instructions"))
            measure.add_text(document.get("input"))
            for place, item in _objects(document.get("input"), "input"):
                _measure_item(item, place, measure)
        case Endpoint.EMBEDDINGS:
            given = document.get("input")
            for text in given if isinstance(given, list) else [given]:
                measure.add_text(text)
            return _count_token_ids(given)
        case _:
            assert_never(endpoint)
    return None


def _outputs(endpoint: Endpoint, document: JsonObject) -> tuple[int, int | None]:
    """Return how many outputs a request has, and how long it says that each may be."""
    match endpoint:
        case Endpoint.CHAT_COMPLETIONS:
            names = ("max_completion_tokens", "max_tokens")
            maxima = [found for name in names if (found := _positive(document, name)) is not None]
            choices = _positive(document, "n") or 1
            if choices > MAX_CHOICES:
                raise InvalidRequest(field="n", reason=f"must be at most {MAX_CHOICES}")
            return choices, max(maxima) if maxima else None
        case Endpoint.RESPONSES:
            return 1, _positive(document, "max_output_tokens")
        case Endpoint.EMBEDDINGS | Endpoint.MODERATIONS:
            return 0, None
        case _:
            assert_never(endpoint)


def _unbounded(field: str) -> InvalidRequest:
    return InvalidRequest(
        field=field, reason="its cost cannot be bounded under a hard budget, so it is not accepted"
    )


def _positive(document: JsonObject, name: str) -> int | None:
    value = document.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 2**31:
        raise InvalidRequest(field=name, reason="must be a positive whole number")
    return value


def _check_modalities(modalities: Json) -> None:
    if modalities is not None and modalities != ["text"]:
        raise _unbounded("modalities")


def _check_tools(endpoint: Endpoint, tools: Json) -> None:
    if tools is None:
        return
    if not isinstance(tools, list):
        raise InvalidRequest(field="tools", reason="must be a list")
    for place, tool in _objects(tools, "tools"):
        kind = tool.get("type")
        if kind in _CLIENT_TOOLS:
            continue
        if endpoint is not Endpoint.RESPONSES or _hosted_tool(tool) is None:
            raise _unbounded(f"{place}.type")
        _check_container(tool.get("container"), f"{place}.container")


def _check_container(container: Json, place: str) -> None:
    """Refuse a container that is not new and of the usual size: it has another price, or somebody else's."""
    if container is None:
        return
    if not isinstance(container, dict) or container.get("type") != "auto":
        raise _unbounded(place)
    if container.get("memory_limit") not in (None, "1g"):
        raise _unbounded(f"{place}.memory_limit")


def _hosted_tool(tool: JsonObject) -> HostedTool | None:
    kind = tool.get("type")
    return HOSTED_TOOLS.get(kind) if isinstance(kind, str) else None


def _hosted(document: JsonObject) -> Hosted | None:
    """Return what the provider may run; None where it runs nothing."""
    given = {kind for _, tool in _objects(document.get("tools"), "tools") if (kind := _hosted_tool(tool))}
    if not given:
        return None
    if given.issuperset(WEB_SEARCHES):
        raise InvalidRequest(
            field="tools", reason="has two kinds of web search, and an answer does not say which it used"
        )
    calls = _positive(document, "max_tool_calls")
    if calls is None:
        raise InvalidRequest(
            field="max_tool_calls",
            reason="is missing: without it the cost of hosted tools cannot be bounded under a hard budget",
        )
    if calls > MAX_TOOL_CALLS:
        raise InvalidRequest(field="max_tool_calls", reason=f"must be at most {MAX_TOOL_CALLS}")
    return Hosted(tuple(tool for tool in HostedTool if tool in given), calls)


def _objects(value: Json, field: str) -> Iterator[tuple[str, JsonObject]]:
    """Go through a list that must hold objects; the strings of an input list are bounded by their bytes."""
    for index, item in enumerate(value if isinstance(value, list) else ()):
        if isinstance(item, dict):
            yield f"{field}[{index}]", item
        elif not (field == "input" and isinstance(item, str)):
            raise InvalidRequest(field=f"{field}[{index}]", reason="must be an object")


def _is_text(messages: Json) -> bool:
    """Say whether messages have nothing but text, as most have: the bytes of the body bound all of it."""
    for message in messages if isinstance(messages, list) else (None,):
        if not isinstance(message, dict) or message.get("audio") is not None:
            return False
        if not isinstance(message.get("content"), str):
            return False
    return True


def _measure_message(message: JsonObject, place: str, measure: _Measure) -> None:
    if message.get("audio") is not None:
        raise _unbounded(f"{place}.audio")
    _measure_said(message, place, measure)


def _measure_said(message: JsonObject, place: str, measure: _Measure) -> None:
    content = message.get("content")
    if isinstance(content, list):
        _measure_content(content, f"{place}.content", measure)
        # Of several parts nobody knows whether the model reads them as one text, which may be cut otherwise.
        content = _text_of(content[0]) if len(content) == 1 else None
    if isinstance(content, str):
        measure.add_text(content)
    elif content is not None:
        _measure_content(content, f"{place}.content", measure)


def _text_of(part: Json) -> Json:
    return part.get("text") if isinstance(part, dict) and part.get("type") in _TEXT_PARTS else None


def _measure_item(item: JsonObject, place: str, measure: _Measure) -> None:
    kind = item.get("type")
    own = _OWN_CONTENT.get(kind or "message") if kind is None or isinstance(kind, str) else None
    said = None if own is None else item.get(own)
    if own is not None and (said is None or (kind == "reasoning" and not (said and isinstance(said, str)))):
        # What is not said here is said elsewhere: an item that the provider keeps, of any length.
        raise _unbounded(place)
    if kind is None or kind == "message":
        _measure_said(item, place, measure)
    elif own == "output":
        _measure_content(said, f"{place}.output", measure)
    elif own is None:
        _measure_part(item, place, measure)


def _measure_content(content: Json, place: str, measure: _Measure) -> None:
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list):
        raise InvalidRequest(field=place, reason="must be a string or a list of parts")
    for part_place, part in _objects(content, place):
        _measure_part(part, part_place, measure)


def _measure_part(part: JsonObject, place: str, measure: _Measure) -> None:
    kind = part.get("type")
    if kind in _TEXT_PARTS:
        return
    source = _source(part)
    if part.get("file_id") is not None or source.get("file_id") is not None:
        raise _unbounded(f"{place}.file_id")
    if kind in _IMAGE_PARTS:
        measure.images += 1
    elif kind in _FILE_PARTS:
        measure.files += 1
    else:
        raise _unbounded(f"{place}.type")
    for name in ("url", "image_url", "file_data"):
        embedded = source.get(name)
        if isinstance(embedded, str) and embedded.startswith("data:"):
            measure.embedded_characters += len(embedded)


def _source(part: JsonObject) -> JsonObject:
    """Return where an attachment's bytes are named: a part of chat nests it, a part of responses is it."""
    nested = part.get("image_url", part.get("file"))
    return nested if isinstance(nested, dict) else part


def _count_token_ids(value: Json) -> int | None:
    """Count an input of token ids, or of lists of them; None where it is text."""
    if not isinstance(value, list):
        return None
    if all(isinstance(item, int) for item in value):
        return len(value)
    lists = [item for item in value if isinstance(item, list)]
    return sum(map(len, lists)) if len(lists) == len(value) else None
