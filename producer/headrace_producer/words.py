"""Numbers and times as people read them."""

from datetime import timedelta


def count(number: int, one: str, many: str | None = None) -> str:
    """Write a number of things.

    >>> count(1, "bad line"), count(1200, "bad line")
    ('1 bad line', '1,200 bad lines')
    """
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def in_words(duration: timedelta) -> str:
    """Write how long something takes, roughly.

    >>> in_words(timedelta(seconds=42)), in_words(timedelta(minutes=95))
    ('42 s', '1 h 35 min')
    """
    seconds = max(0, round(duration.total_seconds()))
    if seconds < 120:  # noqa: PLR2004
        return f"{seconds} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
