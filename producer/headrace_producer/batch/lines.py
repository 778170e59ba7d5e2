"""The lines of an input file, each checked as the job it would become."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

from headrace_producer.batch.files import BatchFile, RawLine
from headrace_producer.batch.shapes import DocumentChecker
from headrace_producer.in_force import Snapshot
from headrace_shared.errors import InvalidInput, InvalidRequest
from headrace_shared.ids import RouteName
from headrace_shared.jsonvalue import Json, JsonObject, read_last
from headrace_shared.request import CheckedDocument

MAX_CUSTOM_ID_LENGTH = 512

_ESCAPED = 6
r"""Bytes of JSON that one byte of a compact body can take at most: ``\u0041``."""
_MARGIN = 65_536
"""For what a line holds beside its body."""

_POSITION = re.compile(r": line 1 column (\d+) \(char \d+\)")


@dataclass(frozen=True, slots=True)
class Draft:
    """A request as its line has it."""

    custom_id: str
    url: str
    body: JsonObject


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """A request that may become a job."""

    line: int
    custom_id: str
    checked: CheckedDocument
    document: JsonObject
    """The body, read."""
    route: RouteName


@dataclass(frozen=True, slots=True)
class BadLine:
    line: int
    reason: str


class Format(Protocol):
    """How requests are written in a file."""

    @property
    def settings(self) -> tuple[str, ...]:
        """What else than the file's content decides what its requests are."""
        ...

    def drafts(self, file: BatchFile, *, longest: int) -> Iterator[tuple[int, Draft] | BadLine]:
        """Go through a file; a draft comes with the number of its line."""
        ...


class OpenAILines:
    """OpenAI's batch format: ``{"custom_id", "method": "POST", "url", "body"}`` on each line."""

    @property
    def settings(self) -> tuple[str, ...]:
        return ()

    def drafts(self, file: BatchFile, *, longest: int) -> Iterator[tuple[int, Draft] | BadLine]:
        for line in file.lines(longest=longest):
            try:
                yield line.number, _openai_draft(json_line(line, longest))
            except InvalidInput as error:
                yield bad_line(line.number, error)


def read_requests(
    file: BatchFile, form: Format, snapshot: Snapshot, *, unique: bool = True
) -> Iterator[BatchRequest | BadLine]:
    """Go through a file in constant memory, but for sixteen bytes of each custom_id.

    Args:
        file: what is read, from its beginning.
        form: how requests are written in it.
        snapshot: the configuration they are checked against.
        unique: whether to look for repeated custom_ids.

    """
    checker = DocumentChecker(max_body_bytes=snapshot.configuration.defaults.max_body_bytes)
    first_lines: dict[bytes, int] = {}
    for found in form.drafts(file, longest=longest_line(snapshot)):
        if isinstance(found, BadLine):
            yield found
            continue
        line, draft = found
        try:
            request = _check(line, draft, snapshot, checker)
            if unique:
                _refuse_repeated(line, draft.custom_id, first_lines)
        except InvalidInput as error:
            yield bad_line(line, error)
        else:
            yield request


def bad_line(number: int, error: InvalidInput) -> BadLine:
    return BadLine(number, error.message.rstrip("."))


def longest_line(snapshot: Snapshot) -> int:
    """Return how many bytes a line can have whose body is short enough."""
    return _ESCAPED * snapshot.configuration.defaults.max_body_bytes + _MARGIN


def json_line(line: RawLine, longest: int) -> JsonObject:
    """Read a line that must be a JSON object.

    Raises:
        InvalidInput: it is not, or is too long.

    """
    if line.data is None:
        raise InvalidInput(reason=f"the line is longer than {longest:,} bytes")
    try:
        return read_last(line.data)
    except InvalidRequest as error:
        reason: str = error.reason
        raise InvalidInput(reason="the line " + _POSITION.sub(r", column \1", reason)) from None


def check_custom_id(value: Json) -> str:
    """Return a custom_id that can be kept.

    Raises:
        InvalidRequest: it is none.

    """
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_CUSTOM_ID_LENGTH or not value.isprintable():
        raise InvalidRequest(
            field="custom_id", reason=f"must be a string of 1 to {MAX_CUSTOM_ID_LENGTH} printable characters"
        )
    return value


def _openai_draft(line: JsonObject) -> Draft:
    missing = [name for name in ("custom_id", "method", "url", "body") if name not in line]
    if missing:
        raise InvalidRequest(field=missing[0], reason="is missing")
    custom_id = check_custom_id(line["custom_id"])
    url, body = line["url"], line["body"]
    if line["method"] != "POST":
        raise InvalidRequest(field="method", reason='must be "POST"')
    if not isinstance(url, str):
        raise InvalidRequest(field="url", reason="must be a string such as /v1/chat/completions")
    if not isinstance(body, dict):
        raise InvalidRequest(field="body", reason="must be a JSON object")
    return Draft(custom_id, url, body)


def _check(line: int, draft: Draft, snapshot: Snapshot, checker: DocumentChecker) -> BatchRequest:
    try:
        checked = checker.check(draft.url, draft.body)
        route = snapshot.priced_route(checked.model, checked.endpoint, checked.bounds.hosted)
    except InvalidRequest as error:
        raise InvalidRequest(field=_place(error.field), reason=error.reason) from None
    return BatchRequest(line, draft.custom_id, checked, draft.body, route)


def _place(field: str) -> str:
    if field == "endpoint":
        return "url"
    return field if field.startswith("body") else f"body.{field}"


def _refuse_repeated(line: int, custom_id: str, first_lines: dict[bytes, int]) -> None:
    first = first_lines.setdefault(blake2b(custom_id.encode(), digest_size=16).digest(), line)
    if first != line:
        raise InvalidRequest(field="custom_id", reason=f"{custom_id[:64]!r} is on line {first:,} already")
