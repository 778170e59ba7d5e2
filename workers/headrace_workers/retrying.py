"""Whether and when a failed call is made again: tenacity decides, nothing here sleeps.

The one place that touches tenacity. Its waits and stops are asked about a failed attempt
as they would be inside its own loop; the answer is a value, because a wait over two
seconds is not slept but put back into the queue.
"""

from datetime import timedelta
from typing import assert_never

from tenacity import RetryCallState, Retrying, stop_after_attempt, wait_random, wait_random_exponential
from tenacity.wait import wait_base

from headrace_shared.outcome import ErrorClass, Failed, Failure, Retry
from headrace_shared.policy import RetryPolicy

_SPREAD = 1.0
"""Seconds over which those that were asked to come back at one moment come back."""


class _FailedCall(Exception):
    def __init__(self, failure: Failure) -> None:
        self.failure = failure


class _RetryAfter(wait_base):
    """Never sooner than the provider asked, up to a cap, and not in lockstep with the others."""

    def __init__(self, policy: RetryPolicy) -> None:
        self._cap = policy.retry_after_cap.total_seconds()
        self._jitter = wait_random_exponential(
            multiplier=policy.initial.total_seconds(), max=policy.maximum.total_seconds()
        )
        self._spread = wait_random(0, _SPREAD)

    def __call__(self, retry_state: RetryCallState) -> float:
        error = retry_state.outcome.exception() if retry_state.outcome else None
        asked = error.failure.retry_after if isinstance(error, _FailedCall) else None
        if asked is None:
            return float(self._jitter(retry_state))
        return min(asked.total_seconds(), self._cap) + float(self._spread(retry_state))


def is_retryable(error_class: ErrorClass) -> bool:
    """Say whether another attempt can come to something else."""
    match error_class:
        case (
            ErrorClass.RATE_LIMITED
            | ErrorClass.TRANSIENT
            | ErrorClass.TIMEOUT
            | ErrorClass.UNREADABLE
            | ErrorClass.HANDLER
            | ErrorClass.INTERNAL
        ):
            return True
        case (
            ErrorClass.BAD_REQUEST
            | ErrorClass.AUTH
            | ErrorClass.CONTEXT_TOO_LONG
            | ErrorClass.CONTENT_FILTER
            | ErrorClass.QUOTA_EXHAUSTED
            | ErrorClass.CANCELLED
            | ErrorClass.BUDGET_EXHAUSTED
            | ErrorClass.UNKNOWN_PRICE
            | ErrorClass.NO_ROUTE
            | ErrorClass.QUARANTINED
            | ErrorClass.EXPIRED
        ):
            return False
        case _:
            assert_never(error_class)


def decide(policy: RetryPolicy, failure: Failure, *, attempts: int, max_attempts: int) -> Retry | Failed:
    """Decide about the attempt that has just failed.

    Args:
        policy: the waits.
        failure: why it failed.
        attempts: attempts that have failed by now, this one included.
        max_attempts: attempts that the job may make in all.

    """
    state = RetryCallState(Retrying(), None, (), {})
    state.attempt_number = attempts
    state.set_exception((_FailedCall, _FailedCall(failure), None))
    if not is_retryable(failure.error_class) or stop_after_attempt(max_attempts)(state):
        return Failed(failure)
    return Retry(timedelta(seconds=_RetryAfter(policy)(state)), failure)
