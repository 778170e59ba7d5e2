"""What steps and handlers return, as JSON and back."""

import inspect
import json
from collections.abc import Awaitable, Callable
from typing import TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

from headrace_shared.errors import InvalidRequest
from headrace_shared.jsonvalue import refuse_not_finite, write_json
from headrace_shared.validation import first_problem

T = TypeVar("T")


def adapter_of(function: Callable[..., Awaitable[T]]) -> TypeAdapter[T]:
    """Return how the result of an async function is written and read: by its annotation, else as it is.

    Raises:
        InvalidRequest: the annotation is of something that JSON cannot carry.

    """
    signature = _signature_of(function)
    try:
        return TypeAdapter(signature.return_annotation)
    except (PydanticSchemaGenerationError, PydanticUserError):
        raise _unfit(f"of {signature.return_annotation!r:.100} cannot be written as JSON") from None


def _signature_of(function: Callable[..., object]) -> inspect.Signature:
    plain = inspect.Signature(return_annotation=object)
    try:
        signature = inspect.signature(function, eval_str=True)
    except (NameError, TypeError, ValueError, SyntaxError, AttributeError):
        return plain
    # A plain function is annotated with what is awaited, and not with what that comes to.
    is_annotated = signature.return_annotation is not inspect.Signature.empty
    return signature if is_annotated and inspect.iscoroutinefunction(function) else plain


def encode(adapter: TypeAdapter[T], value: T, *, limit: int) -> bytes:
    """Write a value as JSON of so many bytes at most.

    Raises:
        InvalidRequest: says what is wrong with it.

    """
    try:
        encoded = write_json(adapter.dump_python(value, mode="json", warnings="error"))
        if b"null" in encoded:
            refuse_not_finite(adapter.dump_python(value))
    except InvalidRequest as error:
        raise _unfit(error.reason) from None
    # What a serialiser of the application's own raises is its own.
    except Exception as error:
        raise _unfit(f"cannot be written as JSON ({type(error).__name__}: {error!s:.200})") from error
    if len(encoded) > limit:
        raise _unfit(
            f"is {len(encoded):,} bytes, more than the {limit:,} that defaults.max_body_bytes allows"
        )
    return encoded


def decode(adapter: TypeAdapter[T], encoded: bytes) -> T:
    """Read a value that `encode` wrote.

    Raises:
        InvalidRequest: it cannot be read as what it is annotated as.

    """
    try:
        # By json, because not all that it writes (a number of any length) can pydantic's own parser read.
        return adapter.validate_python(json.loads(encoded), strict=False)
    except (ValidationError, ValueError) as error:
        raise _unfit(f"cannot be read again ({_first(error)})") from None


def encode_result(output: type[BaseModel], value: object, *, limit: int) -> bytes:
    """Write what a handler returned.

    Raises:
        InvalidRequest: says what is wrong with it.

    """
    try:
        returned = output.model_validate(value)
    except ValidationError as error:
        raise _unfit(f"is no {output.__name__} ({_first(error)})") from None
    return encode(TypeAdapter(type(returned)), returned, limit=limit)


def _first(error: ValueError) -> str:
    return first_problem(error) if isinstance(error, ValidationError) else str(error)


def _unfit(reason: str) -> InvalidRequest:
    return InvalidRequest(field="result", reason=reason)
