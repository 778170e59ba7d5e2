"""The fleet's retries beside its successes: one hash per provider, changed by scripts only.

Successes are counted by the breakers' script, with what the breakers are told. A lost hash is one
without successes: then the floor holds.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import cast

from headrace_shared.dispatch import keys
from headrace_shared.dispatch.connection import Argument, Redis, Script, milliseconds

_RETRIES = Script.load("retries")

WINDOW = timedelta(seconds=10)
"""Retries and successes are counted over this long."""


@dataclass(frozen=True, slots=True)
class Allowance:
    """What came of asking for retries."""

    granted: int
    wait: timedelta
    """After this it is the turn of the first one that was refused."""
    pace: timedelta
    """Between one such turn and the next."""


async def ask(redis: Redis, provider: str, wanted: int, *, share: float, floor: int) -> Allowance:
    """Ask for leave to make calls again; what is granted counts as made.

    Args:
        redis: where the fleet counts.
        provider: whose calls they are.
        wanted: how many.
        share: of the successes in the window.
        floor: so many in a window may go however few successes there were.

    """
    args: list[Argument] = [wanted, repr(share), floor, milliseconds(WINDOW)]
    reply = await redis.evaluate(_RETRIES, [keys.retries(provider)], args)
    granted, wait, pace = cast("tuple[int, int, int]", reply)
    return Allowance(granted, timedelta(milliseconds=wait), timedelta(milliseconds=pace))
