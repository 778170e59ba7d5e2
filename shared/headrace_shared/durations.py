"""Durations as people write them: ``250ms``, ``5s``, ``5m``, ``2h``, ``30d``, or a number of seconds."""

import re
from datetime import timedelta
from decimal import Decimal

_UNITS = {
    "d": timedelta(days=1),
    "h": timedelta(hours=1),
    "m": timedelta(minutes=1),
    "s": timedelta(seconds=1),
    "ms": timedelta(milliseconds=1),
}
_WRITTEN = re.compile(r"(?P<count>\d{1,9}(?:\.\d{1,6})?)\s*(?P<unit>ms|s|m|h|d)")
_LONGEST = timedelta(days=366)


def parse_duration(given: object) -> timedelta:
    """Read a duration from a string, a number of seconds, or a timedelta.

    >>> parse_duration("5m"), parse_duration(2)
    (datetime.timedelta(seconds=300), datetime.timedelta(seconds=2))

    Raises:
        ValueError: anything else, negative, or longer than a year.

    """
    duration = _read(given)
    if duration is None or not timedelta(0) <= duration <= _LONGEST:
        raise ValueError('must be a duration such as "5s", "10m" or "2h", or a number of seconds')
    return duration


def _read(given: object) -> timedelta | None:
    if isinstance(given, timedelta):
        return given
    if isinstance(given, str):
        written = _WRITTEN.fullmatch(given.strip())
        return float(written["count"]) * _UNITS[written["unit"]] if written else None
    if isinstance(given, bool) or not isinstance(given, int | float | Decimal):
        return None
    seconds = float(given)
    return timedelta(seconds=seconds) if 0 <= seconds <= _LONGEST.total_seconds() else None


def format_duration(duration: timedelta) -> str:
    """Write a duration so that it can be read again, in the largest unit that divides it.

    >>> format_duration(timedelta(seconds=300)), format_duration(timedelta(milliseconds=1500))
    ('5m', '1500ms')
    """
    if not duration:
        return "0s"
    for name, unit in _UNITS.items():
        count, rest = divmod(duration, unit)
        if not rest:
            return f"{count}{name}"
    return f"{duration.total_seconds():f}s"
