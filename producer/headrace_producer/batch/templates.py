"""Plain records, CSV or JSONL, and the one prompt that makes a request of each."""

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from typing import Protocol, cast

from headrace_producer.batch.files import BatchFile
from headrace_producer.batch.lines import BadLine, Draft, bad_line, check_custom_id, json_line
from headrace_shared.errors import InvalidInput, InvalidRequest
from headrace_shared.jsonvalue import Json
from headrace_shared.request import Endpoint

_PARTS = re.compile(r"\{\{|\}\}|\{(?P<field>[^{}]*)\}|[{}]")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


class Template:
    """A prompt with fields in braces, such as ``Classify: {text}``; a brace is written twice.

    Raises:
        InvalidInput: a brace has no partner, or names nothing.

    """

    def __init__(self, text: str, *, model: str, id_field: str | None = None) -> None:
        self._text = text
        self._model = model
        self._id_field = id_field
        self._fields = tuple(match["field"] for match in _PARTS.finditer(text) if match["field"] is not None)
        alone = next((match for match in _PARTS.finditer(text) if match[0] in ("{", "}", "{}")), None)
        if alone is not None:
            raise InvalidInput(
                reason=f"--template: {alone[0]!r} at character {alone.start() + 1} names no field "
                "(a brace itself is written twice)."
            )

    @property
    def settings(self) -> tuple[str, ...]:
        return (self._text, self._model, self._id_field or "")

    def drafts(self, file: BatchFile, *, longest: int) -> Iterator[tuple[int, Draft] | BadLine]:
        delimiter = _DELIMITERS.get(file.path.suffix.lower())
        records = (
            _json_records(file, longest) if delimiter is None else _csv_records(file, delimiter, longest)
        )
        for number, record in records:
            if isinstance(record, str):
                yield BadLine(number, record)
                continue
            try:
                yield number, self._draft(number, record)
            except InvalidInput as error:
                yield bad_line(number, error)

    def _draft(self, number: int, record: Mapping[str, Json]) -> Draft:
        for name in (*self._fields, *([self._id_field] if self._id_field else [])):
            if name not in record:
                raise InvalidRequest(
                    field=name, reason=f"the record has no such field, only {_names(record)}"
                )
        custom_id = _words(record[self._id_field]) if self._id_field else f"line-{number}"
        prompt = _PARTS.sub(lambda match: _fill(match, record), self._text)
        return Draft(
            check_custom_id(custom_id),
            Endpoint.CHAT_COMPLETIONS,
            {"model": self._model, "messages": [{"role": "user", "content": prompt}]},
        )


def _fill(part: re.Match[str], record: Mapping[str, Json]) -> str:
    field = part["field"]
    return part[0][0] if field is None else _words(record[field])


def _words(value: Json) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _names(record: Mapping[str, Json]) -> str:
    return ", ".join(list(record)[:10]) or "none at all"


def _json_records(file: BatchFile, longest: int) -> Iterator[tuple[int, Mapping[str, Json] | str]]:
    for line in file.lines(longest=longest):
        try:
            yield line.number, json_line(line, longest)
        except InvalidInput as error:
            yield line.number, error.message


def _csv_records(
    file: BatchFile, delimiter: str, longest: int
) -> Iterator[tuple[int, Mapping[str, Json] | str]]:
    csv.field_size_limit(longest)
    # What is not UTF-8 becomes half surrogate pairs, so that its line can be named.
    text = io.TextIOWrapper(file.stream(), encoding="utf-8", errors="surrogateescape", newline="")
    try:
        yield from _rows(csv.reader(text, delimiter=delimiter, strict=True))
    finally:
        text.detach()


class _Reader(Protocol):
    """What `csv.reader` returns."""

    @property
    def line_num(self) -> int: ...
    def __next__(self) -> list[str]: ...


def _rows(reader: _Reader) -> Iterator[tuple[int, Mapping[str, Json] | str]]:
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, f"the record is not CSV ({error})"
            continue
        if not row:
            continue
        if header is None:
            header = row
        elif len(row) != len(header):
            yield number, f"the record has {len(row)} fields, the header has {len(header)}"
        elif any("\ud800" <= letter <= "\udfff" for field in row for letter in field):
            yield number, "the record is not UTF-8"
        else:
            yield number, cast("dict[str, Json]", dict(zip(header, row, strict=True)))
