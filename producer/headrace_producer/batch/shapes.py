"""Checks of requests most of which differ from each other only in what is said."""

from typing import NamedTuple

from headrace_shared.errors import BodyTooLarge
from headrace_shared.jsonvalue import Json, JsonObject, may_have_nul, write_json
from headrace_shared.request import CheckedDocument, check_document

_KEPT = 256
_LONGEST_KEPT = 1 << 14
_PLAIN = frozenset(("role", "content"))


class _Shape(NamedTuple):
    """What documents have in common of which only the texts of messages differ."""

    checked: CheckedDocument
    size: int
    """Bytes of the body but those of its texts, which are counted as if they were one."""


class DocumentChecker:
    """Checks documents as `check_document` does, what many of them have in common once."""

    def __init__(self, *, max_body_bytes: int) -> None:
        self._most = max_body_bytes
        self._shapes: dict[str, _Shape] = {}

    def check(self, endpoint: str, document: JsonObject) -> CheckedDocument:
        """Check a request that was read from JSON.

        Raises:
            InvalidRequest: names the field and what is wrong with it.
            BodyTooLarge: it has more bytes than may be.

        """
        found = _shape_of(endpoint, document)
        if found is None:
            return check_document(endpoint, document, max_body_bytes=self._most)
        key, said = found
        shape = self._shapes.get(key)
        if shape is None:
            return self._learn(key, said, endpoint, document)
        written = write_json(said)
        if may_have_nul(written):
            return check_document(endpoint, document, max_body_bytes=self._most)
        size = shape.size + len(written)
        if size > self._most:
            raise BodyTooLarge(size=size, limit=self._most)
        known = shape.checked
        return CheckedDocument(known.endpoint, known.model, size, known.bounds)

    def _learn(self, key: str, said: str, endpoint: str, document: JsonObject) -> CheckedDocument:
        """Check the whole of a document, and remember what the next one of its shape need not be asked."""
        checked = check_document(endpoint, document, max_body_bytes=self._most)
        if len(self._shapes) >= _KEPT:
            self._shapes.clear()
        if len(key) <= _LONGEST_KEPT:
            self._shapes[key] = _Shape(checked, checked.size - len(write_json(said)))
        return checked


def _shape_of(endpoint: str, document: JsonObject) -> tuple[str, str] | None:
    """Return all of a document but what its messages say, and what they say; None where that is no text.

    What is equal by the first is so in all that a check looks at, its numbers' and words' types included.
    """
    messages = document.get("messages")
    if not isinstance(messages, list):
        return None
    roles: list[Json] = []
    texts: list[str] = []
    for message in messages:
        if not isinstance(message, dict) or message.keys() != _PLAIN:
            return None
        role, content = message["role"], message["content"]
        if not (isinstance(role, str) and isinstance(content, str)):
            return None
        roles.append(role)
        texts.append(content)
    try:
        return repr((endpoint, document | {"messages": roles})), "".join(texts)
    except RecursionError:
        return None
