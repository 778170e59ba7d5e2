"""The fleet's side of circuit breakers: one hash per target, changed by scripts only."""

from dataclasses import dataclass
from datetime import timedelta
from typing import cast

from headrace_shared.dispatch import keys, retries
from headrace_shared.dispatch.connection import Redis, Script, milliseconds
from headrace_shared.routes import Target

_RECORD = Script.load("breaker_record")
_OPEN = Script.load("breaker_open")
_CLOSE = Script.load("breaker_close")
_PROBE = Script.load("breaker_probe")

_WINDOW_OF_A_LOOK = timedelta(seconds=30)


@dataclass(frozen=True, slots=True)
class View:
    """How a breaker stands for everybody."""

    is_open: bool
    reopens_in: timedelta
    answered: int
    failed: int
    """Calls in the window of the one who asked."""


@dataclass(frozen=True, slots=True)
class Granted:
    """The caller may probe."""


@dataclass(frozen=True, slots=True)
class Closed:
    """There is nothing to probe."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Too early, or somebody else is probing."""

    delay: timedelta


async def record(
    redis: Redis, target: Target, window: timedelta, answered: int, failed: int, *, succeeded: int = 0
) -> View:
    """Count calls and return how the breaker stands.

    Args:
        redis: the dispatch.
        target: whose breaker it is.
        window: over which the counts that come back are summed.
        answered: replies that speak for the target's health, refusals included.
        failed: those that speak against it.
        succeeded: answers of its provider, for the budget of retries.

    """
    args = [milliseconds(window), answered, failed, succeeded, milliseconds(retries.WINDOW)]
    names = [keys.breaker(str(target)), keys.retries(target.provider)]
    reply = await redis.evaluate(_RECORD, names, args)
    state, reopens, ok, bad = cast("tuple[bytes, int, int, int]", reply)
    return View(state == b"open", timedelta(milliseconds=reopens), ok, bad)


async def view(redis: Redis, target: Target) -> View:
    return await record(redis, target, _WINDOW_OF_A_LOOK, 0, 0)


async def open_(
    redis: Redis, target: Target, cooldown: timedelta, owner: str | None
) -> tuple[bool, timedelta]:
    """Open a breaker; say whether that changed anything, and when a probe may go.

    An open one is opened anew only by the owner of the probe that failed.
    """
    reply = await redis.evaluate(_OPEN, [keys.breaker(str(target))], [milliseconds(cooldown), owner or ""])
    changed, remaining = cast("tuple[int, int]", reply)
    return changed == 1, timedelta(milliseconds=remaining)


async def close(redis: Redis, target: Target, owner: str | None) -> bool:
    """Close a breaker, after the owner's probe was answered or (None) by an operator's hand."""
    return await redis.evaluate(_CLOSE, [keys.breaker(str(target))], [owner or ""]) == 1


async def probe(redis: Redis, target: Target, owner: str, lease: timedelta) -> Granted | Closed | Wait:
    """Ask for the one probe of an open breaker."""
    reply = await redis.evaluate(_PROBE, [keys.breaker(str(target))], [owner, milliseconds(lease)])
    verdict, delay = cast("tuple[int, int]", reply)
    match verdict:
        case 1:
            return Granted()
        case 2:
            return Closed()
        case _:
            return Wait(timedelta(milliseconds=delay))
