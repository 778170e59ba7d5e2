"""Logs hold no secret, name their job, and do not flood."""

import asyncio
import io
import json
import logging
from datetime import timedelta

import pytest

from headrace_shared.errors import InvalidConfiguration
from headrace_shared.ids import JobId, Run, new_job_id
from headrace_shared.logs import LogFormat, Occasional, OccasionalFilter, bind_job, configure, redact

CANARY = "CanarySecret0123456789"
SECRETS = [
    f"Authorization: Bearer {CANARY}",
    f"authorization: Basic {CANARY}==",
    f"{{'Authorization': 'Bearer {CANARY}'}}",
    f"(b'Authorization', b'Bearer {CANARY}')",
    f'{{"api-key": "{CANARY}"}}',
    f"x-api-key: {CANARY}",
    f"got bearer {CANARY} from nowhere",
    f"Incorrect API key provided: sk-proj-{CANARY}.",
    f"secret whsec_{CANARY}+/=",
    f"postgresql://user:{CANARY}@db.example.com:5432/headrace",
    f"postgresql://user:p@{CANARY}:x@db.example.com/headrace",
    f"rediss://:{CANARY}@cache.example.com/0",
    f"postgresql:///headrace?password={CANARY}&host=/run",
    f"OPENAI_API_KEY={CANARY}",
    f'{{"client_secret": "{CANARY}"}}',
]
HARMLESS = [
    "job 0190: 12 prompt_tokens=12, model=gpt-4o-mini",
    "task-12345678 waits for the Authorization header",
    "http://127.0.0.1:8080/v1/chat/completions?mail=a@example.com",
    "postgresql://user@db.example.com:5432/headrace",
    "OPENAI_API_KEY is not set: put the secret into this environment variable",
]


def logger_to(stream: io.StringIO, log_format: LogFormat | None = None) -> logging.Logger:
    configure(log_format, stream=stream)
    return logging.getLogger("headrace.test")


@pytest.mark.parametrize("text", SECRETS)
@pytest.mark.parametrize("log_format", ["plain", "json"])
def test_secrets_are_hidden_wherever_they_stand(text: str, log_format: LogFormat) -> None:
    stream = io.StringIO()
    logger = logger_to(stream, log_format)
    logger.info(text)
    logger.info("said: %s", text, extra={"detail": text, "nested": {"deep": [text]}, "api_key": CANARY})
    logger.error("it broke", exc_info=ValueError(text))
    assert "ValueError" in stream.getvalue()
    assert CANARY not in stream.getvalue()


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_no_secret_is_shown(text: str) -> None:
    assert redact(text) == text


def test_a_hidden_secret_leaves_the_rest_of_its_line() -> None:
    assert redact(f"at postgresql://user:{CANARY}@db:5432/x it failed") == (
        "at postgresql://user:…@db:5432/x it failed"
    )


async def test_lines_of_a_job_name_it_and_its_trace() -> None:
    stream = io.StringIO()
    logger = logger_to(stream, "json")
    jobs = [new_job_id(), new_job_id()]

    async def run(job: JobId, number: int) -> None:
        bind_job(job, Run(number), f"00-{number:032x}-{1:016x}-01")
        await asyncio.sleep(0)
        logger.info("line %d\nof it", number, extra={"action": "call"})

    await asyncio.gather(*(run(job, number) for number, job in enumerate(jobs, 1)))
    logger.info("of no job")
    *lines, last = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["job_id"], line["run"], line["message"]) for line in lines] == [
        (str(job), number, f"line {number}\nof it") for number, job in enumerate(jobs, 1)
    ]
    assert [line["trace_id"] for line in lines] == [f"{1:032x}", f"{2:032x}"]
    assert lines[0]["action"] == "call"
    assert lines[0]["level"] == "info"
    assert "job_id" not in last


def test_a_message_cannot_begin_a_line_of_its_own() -> None:
    stream = io.StringIO()
    logger_to(stream, "plain").info("said %s", "hello\r\n2026-01-01 forged")
    assert len(stream.getvalue().splitlines()) == 1


def test_the_environment_chooses_the_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_LOG_FORMAT", "json")
    stream = io.StringIO()
    logger_to(stream).info("hello")
    assert json.loads(stream.getvalue())["message"] == "hello"
    monkeypatch.setenv("HEADRACE_LOG_FORMAT", "xml")
    with pytest.raises(InvalidConfiguration, match="HEADRACE_LOG_FORMAT: must be plain or json"):
        configure()


def test_an_outage_is_told_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    occasionally = Occasional(logging.getLogger("headrace.test"), timedelta(seconds=30), clock=lambda: now)
    for step in range(100):
        now = step / 10
        occasionally.warning("Redis at %s is away", f"host-{step}")
        occasionally.warning("PostgreSQL is away")
    assert caplog.messages == ["Redis at host-0 is away", "PostgreSQL is away"]
    now = 30.0
    occasionally.warning("Redis at %s is away", "host-100")
    assert caplog.messages[2] == "Redis at host-100 is away (99 more like it were left out)"
    assert caplog.records[2].funcName == "test_an_outage_is_told_now_and_then"


def test_a_logger_of_somebody_else_can_be_held_back(caplog: pytest.LogCaptureFixture) -> None:
    logger, hold_back = logging.getLogger("somebody.else"), OccasionalFilter()
    logger.addFilter(hold_back)
    for step in range(100):
        logger.warning("collector away, retrying in %d s", step)
        logger.warning("queue full")
    logger.removeFilter(hold_back)
    assert caplog.messages == ["collector away, retrying in 0 s", "queue full"]
