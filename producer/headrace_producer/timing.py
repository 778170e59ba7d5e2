"""When a job is due and how long it has: what a caller may say about that, checked."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from headrace_shared.errors import InvalidRequest

LONGEST = timedelta(days=365)
_NO_TIME = timedelta(0)


@dataclass(frozen=True, slots=True)
class Timing:
    """When a job is due, and the time it has; what is None was not asked for."""

    delay: timedelta = _NO_TIME
    run_at: datetime | None = None
    ttl: timedelta | None = None
    deadline: datetime | None = None
    timeout: timedelta | None = None


AT_ONCE = Timing()
"""Due now, and with all the time there is."""


def check_timing(delay: object, run_at: object, ttl: object, deadline: object, timeout: object) -> Timing:
    """Return the timing of a job.

    A moment that has passed is allowed here: the job is due at once, and whoever asks for a deadline
    that is over is refused by `check_ahead`, unless that may be said again of a job that there is.

    Raises:
        InvalidRequest: names the option.

    """
    if delay is not None and run_at is not None:
        raise InvalidRequest(field="run_at", reason="says the same as delay: give one of them")
    timing = Timing(
        delay=_NO_TIME if delay is None else _delay(delay),
        run_at=None if run_at is None else check_moment("run_at", run_at),
        ttl=None if ttl is None else check_span("ttl", ttl),
        deadline=None if deadline is None else check_moment("deadline", deadline),
        timeout=None if timeout is None else check_span("timeout", timeout),
    )
    if timing.run_at and timing.deadline and timing.deadline <= timing.run_at:
        raise InvalidRequest(field="deadline", reason="must be later than run_at")
    return timing


def check_moment(field: str, moment: object) -> datetime:
    """Return a moment that is no more than a year ahead.

    Raises:
        InvalidRequest: it is, or it has no time zone.

    """
    if not isinstance(moment, datetime) or moment.utcoffset() is None:
        raise InvalidRequest(
            field=field, reason="must be a datetime with a time zone, such as datetime.now(UTC)"
        )
    if moment - datetime.now(UTC) > LONGEST:
        raise InvalidRequest(field=field, reason=f"must be within {LONGEST.days} days from now")
    return moment


def check_ahead(field: str, moment: datetime | None) -> None:
    """Refuse a moment by which nothing can be done any more.

    Raises:
        InvalidRequest: it has passed, by this machine's clock; the store's decides about the others.

    """
    if moment is not None and moment <= (now := datetime.now(UTC)):
        raise InvalidRequest(
            field=field, reason=f"{moment:%Y-%m-%d %H:%M:%S %Z} has passed, it is {now:%Y-%m-%d %H:%M:%S} UTC"
        )


def check_span(field: str, span: object) -> timedelta:
    """Return a time that something may take.

    Raises:
        InvalidRequest: it is nothing, negative, or longer than a year.

    """
    if not isinstance(span, timedelta) or not _NO_TIME < span <= LONGEST:
        reason = f"must be a timedelta longer than 0 and up to {LONGEST.days} days"
        raise InvalidRequest(field=field, reason=reason)
    return span


def _delay(delay: object) -> timedelta:
    if not isinstance(delay, timedelta) or not _NO_TIME <= delay <= LONGEST:
        raise InvalidRequest(field="delay", reason=f"must be a timedelta from 0 to {LONGEST.days} days")
    return delay
