"""What a script of one's own runs in."""

import asyncio
import sys
from collections.abc import Coroutine
from typing import TypeVar

from headrace_shared.errors import HeadraceError, JobFailed, ResultTimeout

T = TypeVar("T")

FAILED = 1
BAD_INPUT = 2
"""Of the command line as well: asked for what cannot be, or with servers that are away."""


def run(main: Coroutine[object, object, T]) -> T:
    """Run a script's main coroutine, as `asyncio.run` does, and end without a traceback.

    Whatever of Headrace's errors the script has not caught is one sentence on standard error, and the exit
    code that `headrace` has for it: 1 for a job that failed or did not end in time, else 2.
    """
    try:
        return asyncio.run(main)
    except HeadraceError as error:
        sys.stderr.write(f"headrace: {error.message}\n")
        raise SystemExit(exit_code(error)) from None


def exit_code(error: HeadraceError) -> int:
    return FAILED if isinstance(error, JobFailed | ResultTimeout) else BAD_INPUT
