"""The output file and the error file of a batch, as OpenAI's batch API writes them."""

import json
import os
from collections.abc import AsyncIterable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from headrace_producer.batch.files import STANDARD_INPUT
from headrace_shared.errors import InvalidInput
from headrace_shared.job import JobState
from headrace_shared.store.batches import LineResult

_LINE_ENDS = bytes.maketrans(b"\r\n", b"  ")
_CODES = {JobState.EXPIRED: "batch_expired"}


@dataclass(frozen=True, slots=True)
class Written:
    succeeded: int
    failed: int


class Sink(Protocol):
    """Where lines go."""

    def write(self, data: bytes, /) -> object: ...


async def write_results(
    results: AsyncIterable[LineResult], output: Sink | None, errors: Sink | None
) -> Written:
    """Write each result to the one file or the other, as it comes."""
    succeeded = failed = 0
    async for result in results:
        if result.state is JobState.SUCCEEDED:
            succeeded += 1
            if output is not None:
                output.write(success_line(result))
        else:
            failed += 1
            if errors is not None:
                errors.write(failure_line(result))
    return Written(succeeded, failed)


def success_line(result: LineResult) -> bytes:
    """Write the line of a job that succeeded: the answer's bytes as they came, on one line."""
    return _line(result, _response(result, _on_one_line(result.answer or b"null")), b"null")


def failure_line(result: LineResult) -> bytes:
    """Write the line of a job that failed: what its provider refused it with, or why it was not answered.

    An answer that was paid for and failed the job all the same (a content filter) has both.
    """
    error = _json({"code": _CODES.get(result.state, result.error_class), "message": result.error})
    refused = result.status is not None and result.call_error_class == result.error_class
    if not refused or result.status is None:
        return _line(result, b"null", error)
    is_failure = not 200 <= result.status < 300  # noqa: PLR2004
    return _line(result, _response(result, _refusal(result)), b"null" if is_failure else error)


@contextmanager
def replacing(path: Path | None) -> Generator[BinaryIO | None]:
    """A file that takes the place of another one only when all of it was written.

    What is no file, such as /dev/null or a pipe, is written to as it is.

    Raises:
        InvalidInput: it cannot be written.

    """
    if path is None:
        yield None
        return
    target = path.resolve()
    try:
        if target.exists() and not target.is_file():
            with target.open("wb") as stream:
                yield stream
            return
        draft = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            with draft.open("wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)
    except (ConnectionError, TimeoutError):  # of whoever was read from
        raise
    except OSError as error:
        raise _unwritable(path, error.strerror or str(error)) from None


def check_paths(source: Path, *targets: Path | None) -> None:
    """Find out before anything is done whether the input can be read and results can be written.

    Raises:
        InvalidInput: one cannot, or two are the same file.

    """
    if source != STANDARD_INPUT and not os.access(source, os.R_OK):
        reason = "permission denied" if source.exists() else "there is no such file"
        raise InvalidInput(reason=f"{source} cannot be read: {reason}.")
    used = {source.resolve()}
    for target in targets:
        if target is None:
            continue
        if target.resolve() in used and not (target.exists() and not target.is_file()):
            raise InvalidInput(reason=f"{target} is named twice: it would overwrite itself.")
        used.add(target.resolve())
        parent = target.resolve().parent
        if target.is_dir():
            raise _unwritable(target, "it is a directory")
        if not parent.is_dir():
            raise _unwritable(target, f"there is no directory {parent}")
        if not os.access(parent, os.W_OK) and not (target.exists() and os.access(target, os.W_OK)):
            raise _unwritable(target, "permission denied")


def _line(result: LineResult, response: bytes, error: bytes) -> bytes:
    return b'{"id":"batch_req_%b","custom_id":%b,"response":%b,"error":%b}\n' % (
        result.job_id.hex.encode(),
        _json(result.custom_id),
        response,
        error,
    )


def _response(result: LineResult, body: bytes) -> bytes:
    return b'{"status_code":%d,"request_id":%b,"body":%b}' % (
        result.status or 0,
        _json(result.request_id),
        body,
    )


def _refusal(result: LineResult) -> bytes:
    try:
        json.loads(result.answer or b"")
    except (ValueError, RecursionError):
        message = (result.answer or b"").decode(errors="replace") or result.error
        return _json({"error": {"message": message, "type": None, "param": None, "code": None}})
    return _on_one_line(result.answer or b"null")


def _on_one_line(answer: bytes) -> bytes:
    # In JSON, a line's end stands only between words, where a space means the same.
    if b"\0" in answer:  # and a NUL nowhere at all, unless it is not UTF-8
        return _json(json.loads(answer))
    return answer.translate(_LINE_ENDS)


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


def _unwritable(path: Path, reason: str) -> InvalidInput:
    return InvalidInput(reason=f"{path} cannot be written: {reason}.")
