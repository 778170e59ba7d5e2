"""Options that several commands have."""

from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from headrace_producer.timing import check_moment
from headrace_shared.durations import parse_duration
from headrace_shared.errors import InvalidInput

AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="End the output with one JSON object.")]
TenantName: TypeAlias = Annotated[str, typer.Option("--tenant", help="Whose jobs these are.")]
OutputFile: TypeAlias = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where answers are written.")
]
ErrorsFile: TypeAlias = Annotated[
    Path | None, typer.Option("--errors", metavar="FILE", help="Where a batch's failures are written.")
]
Deadline: TypeAlias = Annotated[
    str | None, typer.Option(metavar="MOMENT", help="When a job must have ended: 2026-05-01T12:00Z.")
]


def read_duration(option: str, text: str | None) -> timedelta | None:
    """Read an option such as ``--since 2h``.

    Raises:
        InvalidInput: it is no duration.

    """
    try:
        return None if text is None else parse_duration(text)
    except ValueError as error:
        raise InvalidInput(reason=f"{option}: {error}.") from None


def read_moment(option: str, text: str | None) -> datetime | None:
    """Read an option such as ``--deadline 2026-05-01T12:00+02:00``.

    Raises:
        InvalidInput: it is no moment, has no time zone, or is more than a year ahead.

    """
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise InvalidInput(
            reason=f"{option}: {text!r:.64} is not a moment with a time zone, such as 2026-05-01T12:00Z."
        )
    return check_moment(option, moment)
