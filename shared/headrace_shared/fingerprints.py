"""What requests of one template have in common, found in the requests themselves.

A request has several fingerprints, the closest first: with ever less of how its first message of a user
begins, and at last without it, because nobody says where the fixed part of a prompt ends. All of them hold
its settings (everything but what is asked, and names) and what the system or a developer says. They are
digests: no word of a prompt is in them.
"""

from hashlib import blake2b

from headrace_shared.jsonvalue import Json, JsonObject, canonical_json
from headrace_shared.request_bounds import WITHOUT_OUTPUT, Endpoint

OPENINGS = (8, 16, 32, 64)
"""Characters of the first message that make a fingerprint each."""

_INCIDENTAL = frozenset(
    (
        *("model", "messages", "input", "metadata", "user", "seed", "store", "service_tier"),
        *("prompt_cache_key", "prompt_cache_retention", "safety_identifier"),
    )
)
_INSTRUCTING = ("system", "developer")

_BEGUN: dict[str, blake2b] = {}
"""Digests of settings and instructions by their words: few templates make most of the requests."""
_BEGUN_KEPT = 64
_LONGEST_KEPT = 1 << 16


def fingerprints(endpoint: Endpoint, document: JsonObject) -> tuple[str, ...]:
    """Return the fingerprints of a checked request; none where nothing is written in answer."""
    if endpoint in WITHOUT_OUTPUT:
        return ()
    settings: Json = {name: value for name, value in document.items() if name not in _INCIDENTAL}
    parts: list[Json] = [str(endpoint), settings]
    opening = ""
    for role, text in _texts(document):
        if role in _INSTRUCTING:
            parts.append(text)
        elif not opening:
            opening = text
    digest = _begun(parts)
    found = [digest.hexdigest()]
    taken = 0
    for length in OPENINGS if opening else ():
        digest.update(b"\n" + opening[taken:length].encode("utf-8", "replace"))
        found.append(digest.hexdigest())
        taken = length
        if length >= len(opening):
            break
    return tuple(reversed(found))


def _begun(parts: list[Json]) -> blake2b:
    """Return a digest of what requests of a template have in common, to go on from."""
    try:
        key = repr(parts)
    except RecursionError:
        return blake2b(canonical_json(parts), digest_size=12)
    known = _BEGUN.get(key)
    if known is None:
        known = blake2b(canonical_json(parts), digest_size=12)
        if len(_BEGUN) >= _BEGUN_KEPT:
            _BEGUN.clear()
        if len(key) <= _LONGEST_KEPT:
            _BEGUN[key] = known
    return known.copy()


def _texts(document: JsonObject) -> list[tuple[str, str]]:
    """Return who says what; an input that is a string is a user's."""
    said = document.get("messages", document.get("input"))
    if isinstance(said, str):
        return [("user", said)]
    found: list[tuple[str, str]] = []
    for message in said if isinstance(said, list) else ():
        if isinstance(message, dict):
            role, content = message.get("role"), message.get("content")
            text = content if isinstance(content, str) else _text_of(content)
            found.append((role if isinstance(role, str) else "user", text))
    return found


def _text_of(content: Json) -> str:
    for part in content if isinstance(content, list) else ():
        if isinstance(part, dict) and isinstance(text := part.get("text"), str):
            return text
    return ""
