"""Logs: plain lines for people, JSON lines for machines, and no secret in either."""

import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from typing import Literal, TextIO

from opentelemetry import trace

from headrace_shared.errors import InvalidConfiguration
from headrace_shared.ids import JobId, Run

LogFormat = Literal["plain", "json"]

_FIELDS_OF_ANY_RECORD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
_MAX_KEYS = 200
_CHATTY = ("arq", "httpx2", "httpcore2", "openai")  # a line for each request

_job: ContextVar[tuple[JobId, Run, str | None] | None] = ContextVar("headrace_job", default=None)


def configure(
    log_format: LogFormat | None = None, *, level: int | str = logging.INFO, stream: TextIO | None = None
) -> None:
    """Send all logs of the process to a stream, standard error by default.

    Args:
        log_format: None takes it from HEADRACE_LOG_FORMAT, else plain.
        level: of the root logger.
        stream: where they go.

    Raises:
        InvalidConfiguration: HEADRACE_LOG_FORMAT is neither plain nor json.

    """
    chosen = log_format or os.environ.get("HEADRACE_LOG_FORMAT") or "plain"
    if chosen not in ("plain", "json"):
        raise InvalidConfiguration(where="HEADRACE_LOG_FORMAT", reason="must be plain or json")
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines() if chosen == "json" else PlainLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)


def bind_job(job_id: JobId, run: Run, traceparent: str | None = None) -> None:
    """Name the job in every log line of the current task, and of the tasks it starts, from here on."""
    _job.set((job_id, run, traceparent))


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, job, and what `extra` brought."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_context(),
            **{name: value for name, value in vars(record).items() if name not in _FIELDS_OF_ANY_RECORD},
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            fields["stack"] = record.stack_info
        return json.dumps({name: _clean(name, value) for name, value in fields.items()}, ensure_ascii=False)


class PlainLines(logging.Formatter):
    """Time, level, logger, message, job; a message stays on its line."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the standard library's name
        job = _job.get()
        line = super().formatMessage(record) + (f" (job {job[0]} run {job[1]})" if job else "")
        return line.replace("\r", "\\r").replace("\n", "\\n")

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def _context() -> dict[str, object]:
    fields: dict[str, object] = {}
    job = _job.get()
    if job is not None:
        fields = {"job_id": str(job[0]), "run": job[1]}
    span = trace.get_current_span().get_span_context()
    if span.is_valid:
        fields["trace_id"] = f"{span.trace_id:032x}"
        fields["span_id"] = f"{span.span_id:016x}"
    elif job is not None and job[2]:
        fields["trace_id"] = job[2].split("-")[1] if job[2].count("-") > 1 else job[2]
    return fields


def _clean(name: str, value: object) -> object:
    if _NAMES_A_SECRET.search(name):
        return _HIDDEN
    if value is None or isinstance(value, bool | int | float):
        return value
    return redact(str(value))


_HIDDEN = "…"
_NAMES_A_SECRET = re.compile(r"(?i)authorization|api_?key|passw(or)?d|secret|token$")
_SECRETS = (
    # Headers, as text, as a pair, as a dictionary.
    re.compile(
        r"""(?i)(\b(?:proxy-)?authorization\b["']?\s*[:=,]\s*(?:b?["'])?(?:(?:bearer|basic|token)\s+)?)[^\s"',;]+"""
    ),
    re.compile(r"""(?i)(\b(?:x-)?(?:api-key|auth-token)\b["']?\s*[:=,]\s*(?:b?["'])?)[^\s"',;]+"""),
    re.compile(r"""(?i)(\bbearer\s+)[\w.~+/=-]{8,}"""),
    # Keys that can be told by their beginning.
    re.compile(r"""((?<![A-Za-z0-9])sk-)[\w-]{6,}"""),
    re.compile(r"""(\bwhsec_)[\w+/=-]+"""),
    # Passwords in URLs, and settings such as password=…, ?token=…, "api_key": "…".
    re.compile(r"""(://[^\s:/@"']*:)[^\s/]+(?=@)"""),
    re.compile(r"""(?i)((?:api_?key|passw(?:or)?d|secret|token)(?:=|["']\s*[:=]\s*)["']?)[^\s"'&,;]+"""),
)


def redact(text: str) -> str:
    """Return the text with everything hidden that looks like a secret."""
    for secret in _SECRETS:
        text = secret.sub(rf"\g<1>{_HIDDEN}", text)
    return text


class Occasional:
    """Logs each message at most once per interval, and says with the next how many were left out.

    Two messages are the same when their templates are, whatever their arguments.
    """

    def __init__(
        self,
        logger: logging.Logger,
        interval: timedelta = timedelta(seconds=30),
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._logger = logger
        self._interval = interval.total_seconds()
        self._clock = clock
        self._seen: dict[str, tuple[float, int]] = {}

    def info(self, message: str, *args: object) -> None:
        self._log(logging.INFO, message, args)

    def warning(self, message: str, *args: object) -> None:
        self._log(logging.WARNING, message, args)

    def error(self, message: str, *args: object, exc_info: BaseException | None = None) -> None:
        self._log(logging.ERROR, message, args, exc_info)

    def admit(self, message: str) -> int | None:
        """Say whether a message is due: how many like it were left out since, or None if it is not."""
        now = self._clock()
        last, left_out = self._seen.get(message, (None, 0))
        if last is not None and now - last < self._interval:
            self._seen[message] = last, left_out + 1
            return None
        if len(self._seen) >= _MAX_KEYS:
            self._seen.clear()
        self._seen[message] = now, 0
        return left_out

    def _log(
        self,
        level: int,
        message: str,
        args: tuple[object, ...],
        exc_info: BaseException | None = None,
    ) -> None:
        left_out = self.admit(message)
        if left_out is None:
            return
        if left_out:
            message, args = message + " (%d more like it were left out)", (*args, left_out)
        self._logger.log(level, message, *args, exc_info=exc_info, stacklevel=3)


class OccasionalFilter(logging.Filter):
    """Does to somebody else's logger what `Occasional` does, in silence about what was left out."""

    def __init__(self, interval: timedelta = timedelta(seconds=60)) -> None:
        super().__init__()
        self._due = Occasional(logging.getLogger(__name__), interval)

    def filter(self, record: logging.LogRecord) -> bool:
        return self._due.admit(str(record.msg)) is not None
