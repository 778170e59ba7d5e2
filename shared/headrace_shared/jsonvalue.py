"""JSON as a typed value, and the strict reading of what callers hand in."""

import json
import math
import threading
from collections.abc import Iterable, Mapping
from typing import TypeAlias, TypeGuard

from headrace_shared.errors import InvalidRequest

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
JsonObject: TypeAlias = "dict[str, Json]"

# Made once: `json.dumps` makes one for each call that does not have its defaults.
_COMPACT = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_CANONICAL = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), sort_keys=True)


def is_table(value: object) -> TypeGuard[dict[str, object]]:
    """Say whether a value that was read from JSON or TOML is an object."""
    return isinstance(value, dict)


def write_json(value: object) -> bytes:
    """Write compact UTF-8 JSON.

    Raises:
        InvalidRequest: a value that JSON has no word for, NaN, or half of a surrogate pair.

    """
    try:
        return _COMPACT.encode(value).encode()
    except UnicodeEncodeError:
        raise InvalidRequest(field="body", reason=_SURROGATE) from None
    except (TypeError, ValueError) as error:
        raise InvalidRequest(field="body", reason=f"cannot be written as JSON ({error})") from None
    except RecursionError:
        raise InvalidRequest(field="body", reason=_DEPTH) from None


def storable(text: str) -> str:
    """Return a text without what cannot be kept: Postgres holds no NUL, UTF-8 no half of a pair."""
    return text.replace("\0", "").encode("utf-8", "replace").decode()


def canonical_json(value: Json) -> bytes:
    """Write JSON that is the same for equal values: sorted keys, no spaces.

    Raises:
        InvalidRequest: a number beyond the range of a float, or half of a surrogate pair.

    """
    try:
        return _CANONICAL.encode(value).encode()
    except UnicodeEncodeError:
        raise InvalidRequest(field="body", reason=_SURROGATE) from None
    except ValueError:
        raise InvalidRequest(field="body", reason="contains a number that is not finite") from None
    except RecursionError:
        raise InvalidRequest(field="body", reason=_DEPTH) from None


def read_object(body: bytes) -> tuple[JsonObject, bool]:
    """Read a JSON object from UTF-8, and tell whether any of its objects repeats a key (the last one counts).

    Raises:
        InvalidRequest: not UTF-8, not JSON, NaN or Infinity, not an object, or too deep.

    """
    reader = _READERS.mine
    reader.repeats_keys = False
    return _decode(reader.decoder, body), reader.repeats_keys


def read_last(body: bytes) -> JsonObject:
    """Read a JSON object as `read_object` does, in less time: nobody is told of keys that are repeated.

    Raises:
        InvalidRequest: as `read_object`.

    """
    return _decode(_DECODER, body)


def _decode(decoder: json.JSONDecoder, body: bytes) -> JsonObject:
    try:
        value: Json = decoder.decode(body.decode())
    except UnicodeDecodeError as error:
        raise InvalidRequest(field="body", reason=f"is not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise InvalidRequest(field="body", reason=_DEPTH) from None
    except ValueError as error:
        raise InvalidRequest(field="body", reason=f"is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise InvalidRequest(field="body", reason="must be a JSON object")
    return value


def may_have_nul(written: bytes) -> bool:
    """Say whether to look for a NUL character in what was written as JSON."""
    return _NUL in written


def refuse_nul(document: JsonObject) -> None:
    """Refuse a document with a NUL character in a string or a key.

    Raises:
        InvalidRequest: names the place.

    """
    try:
        place = _find_nul(document, "body")
    except RecursionError:
        raise InvalidRequest(field="body", reason=_DEPTH) from None
    if place is not None:
        raise InvalidRequest(field=place, reason="contains a NUL character, which cannot be stored")


def refuse_not_finite(value: object) -> None:
    """Refuse NaN and infinities, which pydantic makes null of where it has no type to go by.

    Raises:
        InvalidRequest: there is one.

    """
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidRequest(field="body", reason="contains a number that is not finite")
    if _is_mapping(value):
        value = list(value.values())
    if _is_collection(value):
        for item in value:
            refuse_not_finite(item)


def _is_mapping(value: object) -> TypeGuard[Mapping[object, object]]:
    return isinstance(value, Mapping)


def _is_collection(value: object) -> TypeGuard[Iterable[object]]:
    return isinstance(value, list | tuple | set | frozenset)


def _find_nul(value: Json, path: str) -> str | None:
    match value:
        case str():
            return path if "\0" in value else None
        case list():
            found = (_find_nul(item, f"{path}[{index}]") for index, item in enumerate(value))
        case dict():
            if any("\0" in key for key in value):
                return path
            found = (_find_nul(item, f"{path}.{key}") for key, item in value.items())
        case _:
            return None
    return next((place for place in found if place is not None), None)


def _refuse_constant(name: str) -> Json:
    raise ValueError(f"{name} is not a JSON number")


class _Reader:
    """A decoder, made once, that tells whether an object repeats a key."""

    def __init__(self) -> None:
        self.repeats_keys = False
        self.decoder = json.JSONDecoder(object_pairs_hook=self._build, parse_constant=_refuse_constant)

    def _build(self, pairs: list[tuple[str, Json]]) -> JsonObject:
        built = dict(pairs)
        if len(built) != len(pairs):
            self.repeats_keys = True
        return built


class _Readers(threading.local):
    """One for each thread: what a reader has found is its own."""

    def __init__(self) -> None:
        self.mine = _Reader()


_NUL = rb"\u0000"
_READERS = _Readers()
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)

_SURROGATE = "contains half of a surrogate pair, which UTF-8 cannot carry"
_DEPTH = "is nested too deeply"
