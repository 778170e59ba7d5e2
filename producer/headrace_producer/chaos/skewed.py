"""Runs a `headrace` command in a process whose clock is wrong; its arguments: SECONDS COMMAND...

What tells the time of day is shifted, what measures durations is not, as on a machine with a wrong clock.
"""

import datetime as dt
import sys
import time
from typing import Self

_DATETIME = dt.datetime


class _Meta(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _DATETIME)


class _Shifted(_DATETIME, metaclass=_Meta):
    """A datetime that takes the present from the shifted clock."""

    @classmethod
    def now(cls, tz: dt.tzinfo | None = None) -> Self:
        return cls.fromtimestamp(time.time(), tz)

    @classmethod
    def utcnow(cls) -> Self:
        return cls.fromtimestamp(time.time(), dt.UTC).replace(tzinfo=None)


def shift(seconds: int) -> None:
    """Shift the time of day in this process, before anything has taken a copy of the functions."""
    of_day, of_day_ns, local, utc = time.time, time.time_ns, time.localtime, time.gmtime

    def localtime(given: float | None = None, /) -> time.struct_time:
        return local(of_day() + seconds if given is None else given)

    def gmtime(given: float | None = None, /) -> time.struct_time:
        return utc(of_day() + seconds if given is None else given)

    time.__dict__.update(
        time=lambda: of_day() + seconds,
        time_ns=lambda: of_day_ns() + seconds * 1_000_000_000,
        localtime=localtime,
        gmtime=gmtime,
    )
    dt.__dict__.update(datetime=_Shifted)


def main() -> None:
    seconds, *arguments = sys.argv[1:]
    shift(int(seconds))
    # Only now: everything that it imports takes the shifted clock.
    from headrace_producer import cli  # noqa: PLC0415

    sys.exit(cli.run(arguments))


if __name__ == "__main__":
    main()
