"""What pydantic found wrong with a configuration, in one sentence with the TOML path."""

import difflib
import re
from collections.abc import Iterable

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from headrace_shared.errors import InvalidConfiguration
from headrace_shared.validation import plain_reason

UNKNOWN_KEY = "unknown_key"

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")

_SENTENCES = {
    "bool_type": "must be true or false",
    "dict_type": "must be a table",
    "frozen_set_type": "must be a list",
    "int_type": "must be a whole number",
    "list_type": "must be a list",
    "mapping_type": "must be a table",
    "missing": "is missing",
    "model_type": "must be a table",
    "string_type": "must be a string",
    "tuple_type": "must be a list",
}
_KINDS = ((bool, "a boolean"), (str, "a string"), (dict, "a table"), (list, "a list"))


def invalid_configuration(error: ValidationError) -> InvalidConfiguration:
    """Turn the first finding into this project's error; no value is ever repeated."""
    details = error.errors(include_url=False)[0]
    path = toml_path(details["loc"])
    if details["type"] == UNKNOWN_KEY:
        context = details.get("ctx", {})
        where = toml_path((*details["loc"], str(context["key"])))
        return InvalidConfiguration(where=where, reason=details["msg"])
    return InvalidConfiguration(where=path or "headrace.toml", reason=_sentence(details))


def unknown_key_reason(key: str, known: Iterable[str]) -> str:
    """Say which key was probably meant.

    >>> unknown_key_reason("base_urll", ["api_key", "base_url"])
    'unknown key (did you mean base_url?)'
    """
    names = list(known)
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    return (
        f"unknown key (did you mean {near[0]}?)" if near else f"unknown key (use one of {', '.join(names)})"
    )


def toml_path(places: Iterable[str | int]) -> str:
    """Write a path as TOML does.

    >>> toml_path(("prices", "openai/gpt-4o", "input"))
    'prices."openai/gpt-4o".input'
    """
    path = ""
    for place in places:
        if isinstance(place, int):
            path += f"[{place}]"
        elif place != "[key]":
            path += "." * bool(path) + (place if _BARE_KEY.fullmatch(place) else f'"{place}"')
    return path


def _sentence(details: ErrorDetails) -> str:
    known = _SENTENCES.get(details["type"])
    if known is None:
        return plain_reason(details["msg"])
    given: object = details["input"]
    kind = next((name for of, name in _KINDS if isinstance(given, of)), "a number")
    return known if details["type"] == "missing" else f"{known}, not {kind}"
