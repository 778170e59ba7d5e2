"""What a script of one's own runs in."""

import asyncio
import sys
from collections.abc import Coroutine
from typing import TypeVar

from headrace_shared.errors import HeadraceError

T = TypeVar("T")

_STOPPED = 2


def run(main: Coroutine[object, object, T]) -> T:
    """Run a script's main coroutine, as `asyncio.run` does, and end without a traceback.

    Whatever of Headrace's errors the script has not caught, a job's failure among them, is one sentence on
    standard error and exit code 2.
    """
    try:
        return asyncio.run(main)
    except HeadraceError as error:
        sys.stderr.write(f"headrace: {error.message}\n")
        raise SystemExit(_STOPPED) from None
