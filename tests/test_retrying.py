"""Whether and when a failed call is made again."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from headrace_shared.outcome import ErrorClass, Failed, Failure, Retry
from headrace_shared.policy import RetryPolicy
from headrace_workers.providers import classify, retry_after
from headrace_workers.retrying import decide, is_retryable

SECOND = timedelta(seconds=1)
POLICY = RetryPolicy(
    max_attempts=6,
    initial=SECOND,
    maximum=30 * SECOND,
    slot_wait=2 * SECOND,
    retry_after_cap=120 * SECOND,
)
RETRYABLE = {
    ErrorClass.RATE_LIMITED: True,
    ErrorClass.TRANSIENT: True,
    ErrorClass.TIMEOUT: True,
    ErrorClass.UNREADABLE: True,
    ErrorClass.INTERNAL: True,
    ErrorClass.BAD_REQUEST: False,
    ErrorClass.AUTH: False,
    ErrorClass.CONTEXT_TOO_LONG: False,
    ErrorClass.CONTENT_FILTER: False,
    ErrorClass.QUOTA_EXHAUSTED: False,
    ErrorClass.CANCELLED: False,
    ErrorClass.BUDGET_EXHAUSTED: False,
    ErrorClass.UNKNOWN_PRICE: False,
    ErrorClass.NO_ROUTE: False,
    ErrorClass.HANDLER: True,
    ErrorClass.QUARANTINED: False,
    ErrorClass.EXPIRED: False,
}


def failure(asked: timedelta | None = None, error_class: ErrorClass = ErrorClass.TRANSIENT) -> Failure:
    return Failure(error_class, "503: overloaded", asked)


def delays(attempts: int, asked: timedelta | None = None) -> list[timedelta]:
    decisions = [decide(POLICY, failure(asked), attempts=attempts, max_attempts=9999) for _ in range(400)]
    return [decision.delay for decision in decisions if isinstance(decision, Retry)]


def test_the_table_knows_every_error_class() -> None:
    assert set(RETRYABLE) == set(ErrorClass)


@pytest.mark.parametrize(("error_class", "retryable"), RETRYABLE.items())
def test_only_what_can_come_to_something_else_is_tried_again(
    error_class: ErrorClass, *, retryable: bool
) -> None:
    assert is_retryable(error_class) is retryable
    failed = failure(error_class=error_class)
    decision = decide(POLICY, failed, attempts=1, max_attempts=6)
    assert isinstance(decision, Retry if retryable else Failed)
    assert decision.failure is failed


@pytest.mark.parametrize(
    ("attempts", "most"), [(1, 1), (2, 2), (3, 4), (5, 16), (6, 30), (60, 30), (5000, 30)]
)
def test_jitter_is_full_and_its_bound_doubles_up_to_the_maximum(attempts: int, most: int) -> None:
    drawn = delays(attempts)
    assert len(drawn) == 400
    assert timedelta(0) <= min(drawn) < 0.1 * most * SECOND
    assert 0.9 * most * SECOND < max(drawn) <= most * SECOND


@pytest.mark.parametrize(("asked", "least"), [(7, 7), (120, 120), (3600, 120)])
def test_what_the_provider_asked_for_is_waited_up_to_a_cap_and_not_in_lockstep(
    asked: int, least: int
) -> None:
    drawn = delays(4, asked * SECOND)
    assert least * SECOND <= min(drawn)
    assert max(drawn) <= (least + 1) * SECOND
    assert len(set(drawn)) > 350


@pytest.mark.parametrize("attempts", [6, 7])
def test_the_last_attempt_fails_with_its_own_failure(attempts: int) -> None:
    last = failure(5 * SECOND, ErrorClass.RATE_LIMITED)
    assert isinstance(decide(POLICY, last, attempts=5, max_attempts=6), Retry)
    assert decide(POLICY, last, attempts=attempts, max_attempts=6) == Failed(last)


@pytest.mark.parametrize(
    ("headers", "asked"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7 * SECOND),
        ({"retry-after": " 7 "}, 7 * SECOND),
        ({"retry-after": "0.25"}, SECOND / 4),
        ({"retry-after-ms": "250"}, SECOND / 4),
        ({"retry-after-ms": "250", "retry-after": "7"}, SECOND / 4),
        *(
            ({name: value}, None)
            for name in ("retry-after", "retry-after-ms")
            for value in ("", "0", "-1", "soon", "nan", "inf", "-inf", "1e400", "9" * 400, "\x00", "0x10")
        ),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, None),
        ({"retry-after": "Wed, 99 Oct 2015 07:28:00 GMT"}, None),
    ],
)
def test_retry_after_is_read_or_counts_as_absent(headers: dict[str, str], asked: timedelta | None) -> None:
    assert retry_after(headers) == asked


@pytest.mark.parametrize("zone", [" GMT", " +0000", ""])
def test_retry_after_may_be_a_date(zone: str) -> None:
    moment = datetime.now(UTC) + 100 * SECOND
    text = format_datetime(moment, usegmt=True).removesuffix(" GMT") + zone
    asked = retry_after({"retry-after": text})
    assert asked is not None
    assert 0 * SECOND < asked <= 100 * SECOND


@pytest.mark.parametrize(
    ("status", "code", "error_class"),
    [
        (400, "", ErrorClass.BAD_REQUEST),
        (401, "invalid_api_key", ErrorClass.AUTH),
        (403, "", ErrorClass.AUTH),
        (404, "model_not_found", ErrorClass.BAD_REQUEST),
        (408, "", ErrorClass.TIMEOUT),
        (409, "", ErrorClass.TRANSIENT),
        (413, "", ErrorClass.BAD_REQUEST),
        (422, "", ErrorClass.BAD_REQUEST),
        (429, "rate_limit_exceeded", ErrorClass.RATE_LIMITED),
        (429, "insufficient_quota", ErrorClass.QUOTA_EXHAUSTED),
        (429, "", ErrorClass.RATE_LIMITED),
        (400, "context_length_exceeded", ErrorClass.CONTEXT_TOO_LONG),
        (400, "exceed_context_size_error", ErrorClass.CONTEXT_TOO_LONG),
        (400, "content_filter", ErrorClass.CONTENT_FILTER),
        (400, "content_policy_violation", ErrorClass.CONTENT_FILTER),
        (400, "billing_hard_limit_reached", ErrorClass.QUOTA_EXHAUSTED),
        (500, "", ErrorClass.TRANSIENT),
        (502, "", ErrorClass.TRANSIENT),
        (503, "", ErrorClass.TRANSIENT),
        (504, "", ErrorClass.TIMEOUT),
        (529, "overloaded_error", ErrorClass.TRANSIENT),
    ],
)
def test_a_refusal_is_classified_by_its_code_and_status(
    status: int, code: str, error_class: ErrorClass
) -> None:
    assert classify(status, code) is error_class
