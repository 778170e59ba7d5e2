"""A request on its way in and on its way out: checked once, then made ready for a provider."""

import difflib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias, assert_never

from headrace_shared.errors import BodyTooLarge, InvalidRequest
from headrace_shared.handlers import HandlerEndpoint
from headrace_shared.hosted_tools import Hosted
from headrace_shared.jsonvalue import (
    Json,
    JsonObject,
    canonical_json,
    may_have_nul,
    read_last,
    read_object,
    refuse_nul,
    write_json,
)
from headrace_shared.request_bounds import Bounds, Endpoint, bounds_of, check_bounded
from headrace_shared.vocabularies import Vocabulary, counted

__all__ = [
    "ENDPOINTS",
    "BoundsKnown",
    "CheckedDocument",
    "CheckedInput",
    "CheckedRequest",
    "Endpoint",
    "PreparedRequest",
    "check_document",
    "check_input",
    "check_request",
    "prepare",
]

ENDPOINTS: tuple[Endpoint, ...] = tuple(Endpoint)

MAX_MODEL_LENGTH = 200


@dataclass(frozen=True, slots=True)
class CheckedDocument:
    """What is known of a request that was checked and is not to become a job yet: a quote goes by it."""

    endpoint: Endpoint
    model: str
    size: int
    """Bytes of its body, written as JSON."""
    bounds: Bounds


@dataclass(frozen=True, slots=True)
class CheckedRequest:
    """A request that may become a job."""

    endpoint: Endpoint
    model: str
    body: bytes
    """UTF-8 JSON: the caller's own bytes where it handed in bytes."""
    repeatable: bool
    """Whether the same answer is expected each time it is asked."""
    digest: bytes
    """SHA-256 over the endpoint and the body, the same for any order of keys."""
    bounds: Bounds


@dataclass(frozen=True, slots=True)
class CheckedInput:
    """A handler's input that may become a job."""

    body: bytes
    digest: bytes


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request as a target receives it, with the most tokens it can cost."""

    body: bytes
    input_bound: int
    """Of one reading: with hosted tools, the model may read again and more."""
    output_bound: int
    hosted: Hosted | None = None
    """Tools that the provider may run."""


def check_request(
    endpoint: str, body: Mapping[str, object] | bytes | str, *, max_body_bytes: int
) -> CheckedRequest:
    """Check what a caller hands in, before anything is stored.

    Raises:
        InvalidRequest: names the field and what is wrong with it.
        BodyTooLarge: more bytes than ``max_body_bytes``.

    """
    known = _find_endpoint(endpoint)
    encoded, document, digest = _read(known, body, max_body_bytes)
    model, bounds = _check(known, document)
    return CheckedRequest(known, model, encoded, _is_repeatable(known, document), digest, bounds)


def check_document(endpoint: str, document: JsonObject, *, max_body_bytes: int) -> CheckedDocument:
    """Check a request that was read from JSON before, as `check_request` would.

    Raises:
        InvalidRequest: names the field and what is wrong with it.
        BodyTooLarge: more bytes than ``max_body_bytes``.

    """
    known = _find_endpoint(endpoint)
    encoded = write_json(document)
    if len(encoded) > max_body_bytes:
        raise BodyTooLarge(size=len(encoded), limit=max_body_bytes)
    if may_have_nul(encoded):
        refuse_nul(document)
    model, bounds = _check(known, document)
    return CheckedDocument(known, model, len(encoded), bounds)


def _check(known: Endpoint, document: JsonObject) -> tuple[str, Bounds]:
    """Return the model and the bounds of a request."""
    model = _check_model(document.get("model"))
    _check_delivery(document)
    _check_content(known, document)
    return model, check_bounded(known, document)


def check_input(
    endpoint: HandlerEndpoint, body: Mapping[str, object] | bytes | str, *, max_body_bytes: int
) -> CheckedInput:
    """Check what a caller hands in for a handler; what it means, only the handler knows.

    Raises:
        InvalidRequest: names the field and what is wrong with it.
        BodyTooLarge: more bytes than ``max_body_bytes``.

    """
    encoded, _, digest = _read(endpoint, body, max_body_bytes)
    return CheckedInput(encoded, digest)


def _read(
    endpoint: str, body: Mapping[str, object] | bytes | str, max_body_bytes: int
) -> tuple[bytes, JsonObject, bytes]:
    """Return a body as it is kept, as it is read, and the digest of what it asks for."""
    encoded = _encode(body)
    if len(encoded) > max_body_bytes:
        raise BodyTooLarge(size=len(encoded), limit=max_body_bytes)
    document, repeats_keys = read_object(encoded)
    digest = _digest(endpoint, document)
    if repeats_keys:
        # Readers disagree on which of two equal keys counts: what was checked is what must be sent.
        encoded = write_json(document)
    return encoded, document, digest


def _digest(endpoint: str, document: JsonObject) -> bytes:
    canonical = canonical_json(document)
    if may_have_nul(canonical):
        refuse_nul(document)
    return hashlib.sha256(endpoint.encode() + b"\n" + canonical).digest()


BoundsKnown: TypeAlias = dict[tuple[Vocabulary | None, bool], Bounds]
"""Of one request: what it was counted in already, and whether it was written in ASCII."""


def prepare(
    request_body: bytes,
    endpoint: Endpoint,
    target_model: str,
    default_max_output_tokens: int,
    vocabulary: Vocabulary | None = None,
    *,
    known: BoundsKnown | None = None,
) -> PreparedRequest:
    """Make a checked body ready for a target: its model, a maximum of output tokens, its bounds.

    The body stays the caller's own bytes where nothing has to change.

    Args:
        request_body: as it was checked.
        endpoint: what is asked.
        target_model: who answers.
        default_max_output_tokens: for a request that names no maximum.
        vocabulary: what the target is known to use; the bounds hold for no other.
        known: bounds of this body that were found before, added to.

    Raises:
        InvalidRequest: the body was never checked, and is wrong.

    """
    document = read_last(request_body)
    body, size = request_body, len(request_body)
    maximum = _missing_maximum(endpoint, document)
    if document.get("model") != target_model or (maximum is not None and maximum in document):
        missing = {} if maximum is None else {maximum: default_max_output_tokens}
        body = write_json(document | {"model": target_model} | missing)
        size = len(body)  # a number may be longer than it was: 1e15
    elif maximum is not None:
        # An object that has a model has a member to put a comma after: cheaper than writing it anew.
        body = b'%b,"%b":%d}' % (body.rstrip()[:-1], maximum.encode(), default_max_output_tokens)
    counting = vocabulary, body.isascii()
    bounds = known.get(counting) if known is not None else None
    if bounds is None:
        bounds = bounds_of(endpoint, document, counted(vocabulary, body))
        if known is not None:
            known[counting] = bounds
    return PreparedRequest(
        body=body,
        input_bound=bounds.input(size),
        output_bound=bounds.output(default_max_output_tokens),
        hosted=bounds.hosted,
    )


def _find_endpoint(endpoint: str) -> Endpoint:
    try:
        return Endpoint(endpoint)
    except ValueError:
        near = difflib.get_close_matches(endpoint[:64], ENDPOINTS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"use {', '.join(ENDPOINTS)}"
        raise InvalidRequest(field="endpoint", reason=f"{endpoint[:64]!r} is not known ({hint})") from None


def _encode(body: Mapping[str, object] | bytes | str) -> bytes:
    if isinstance(body, bytes):
        return body
    if isinstance(body, str):
        try:
            return body.encode()
        except UnicodeEncodeError:
            raise InvalidRequest(field="body", reason="contains half of a surrogate pair") from None
    return write_json(dict(body))


def _check_model(model: Json) -> str:
    if not isinstance(model, str) or not model:
        raise InvalidRequest(field="model", reason="must be a string that names a model")
    if len(model) > MAX_MODEL_LENGTH or not model.isprintable() or " " in model:
        raise InvalidRequest(
            field="model", reason=f"must be at most {MAX_MODEL_LENGTH} printable characters without a space"
        )
    return model


def _check_delivery(document: JsonObject) -> None:
    if document.get("stream") not in (None, False):
        raise InvalidRequest(field="stream", reason="must be absent or false: a job's answer is kept whole")
    if document.get("background") not in (None, False):
        raise InvalidRequest(
            field="background", reason="must be absent or false: a job is in the background already"
        )


def _is_repeatable(endpoint: Endpoint, document: JsonObject) -> bool:
    match endpoint:
        case Endpoint.EMBEDDINGS | Endpoint.MODERATIONS:
            return True
        case Endpoint.CHAT_COMPLETIONS | Endpoint.RESPONSES:
            temperature = document.get("temperature")
            return temperature == 0 and not isinstance(temperature, bool)
        case _:
            assert_never(endpoint)


def _check_content(endpoint: Endpoint, document: JsonObject) -> None:
    match endpoint:
        case Endpoint.CHAT_COMPLETIONS:
            messages = document.get("messages")
            if not isinstance(messages, list) or not messages:
                raise InvalidRequest(field="messages", reason="must be a list of at least one message")
        case Endpoint.EMBEDDINGS:
            _check_embedding_input(document.get("input"))
        case Endpoint.RESPONSES | Endpoint.MODERATIONS:
            content = document.get("input")
            if not isinstance(content, str | list) or not content:
                raise InvalidRequest(field="input", reason="must be a string or a list, and not empty")
            if not isinstance(document.get("instructions"), str | None):
                raise InvalidRequest(field="instructions", reason="must be a string")
        case _:
            assert_never(endpoint)


def _check_embedding_input(value: Json) -> None:
    reason = (
        "must be a string, a list of strings, a list of token ids, or a list of such lists, and not empty"
    )
    if not value or not isinstance(value, str | list):
        raise InvalidRequest(field="input", reason=reason)
    if isinstance(value, list):
        texts = all(isinstance(item, str) for item in value)
        lists = all(isinstance(item, list) and _are_token_ids(item) for item in value)
        if not (texts or lists or _are_token_ids(value)):
            raise InvalidRequest(field="input", reason=reason)


def _are_token_ids(value: list[Json]) -> bool:
    return all(isinstance(item, int) and not isinstance(item, bool) for item in value)


def _missing_maximum(endpoint: Endpoint, document: JsonObject) -> str | None:
    """Return the name of the output maximum that has to be added."""
    match endpoint:
        case Endpoint.CHAT_COMPLETIONS:
            names = ("max_completion_tokens", "max_tokens")
            return "max_completion_tokens" if all(document.get(name) is None for name in names) else None
        case Endpoint.RESPONSES:
            return None if document.get("max_output_tokens") is not None else "max_output_tokens"
        case Endpoint.EMBEDDINGS | Endpoint.MODERATIONS:
            return None
        case _:
            assert_never(endpoint)
