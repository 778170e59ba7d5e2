"""The fleet's side of circuit breakers: one hash per target, changed by scripts only."""

import contextlib
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
_HOLD = Script.load("breaker_hold")
_GIVE_BACK = Script.load("breaker_give_back")

_WINDOW_OF_A_LOOK = timedelta(seconds=30)


@dataclass(frozen=True, slots=True)
class View:
    """How a breaker stands for everybody."""

    is_open: bool
    reopens_in: timedelta
    answered: int
    failed: int
    """Calls in the window of the one who asked."""
    by_hand: bool = False
    """An operator opened it; then `reopens_in` says only when to ask again."""
    probing: bool = False
    """A probe is out."""


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
    state, reopens, ok, bad, hand, probing = cast("tuple[bytes, int, int, int, int, int]", reply)
    return View(state == b"open", timedelta(milliseconds=reopens), ok, bad, hand == 1, probing == 1)


async def view(redis: Redis, target: Target, window: timedelta = _WINDOW_OF_A_LOOK) -> View:
    """Return how a breaker stands, and change nothing."""
    return await record(redis, target, window, 0, 0)


async def open_(
    redis: Redis, target: Target, cooldown: timedelta, owner: str | None
) -> tuple[bool, timedelta]:
    """Open a breaker; say whether that changed anything, and when a probe may go.

    An open one is opened anew only by the owner of the probe that failed.
    """
    reply = await redis.evaluate(_OPEN, [keys.breaker(str(target))], [milliseconds(cooldown), owner or ""])
    changed, remaining = cast("tuple[int, int]", reply)
    return changed == 1, timedelta(milliseconds=remaining)


async def hold_open(redis: Redis, target: Target, duration: timedelta | None) -> None:
    """Open a breaker by an operator's hand, for a time or (None) until one closes it."""
    await redis.evaluate(
        _HOLD, [keys.breaker(str(target))], [0 if duration is None else milliseconds(duration)]
    )


async def known(redis: Redis) -> list[Target]:
    """Return the targets that have a breaker in Redis: those that were called of late, or are open."""
    found = [name.removeprefix(keys.BREAKER) for name in await redis.names(f"{keys.BREAKER}*")]
    targets: list[Target] = []
    for name in found:
        with contextlib.suppress(ValueError):
            targets.append(Target.parse(name))
    return sorted(targets, key=str)


async def close(redis: Redis, target: Target, owner: str | None) -> bool:
    """Close a breaker, after the owner's probe was answered or (None) by an operator's hand."""
    return await redis.evaluate(_CLOSE, [keys.breaker(str(target))], [owner or ""]) == 1


async def give_back(redis: Redis, target: Target, owner: str) -> None:
    """Let somebody else have the probe that was not sent."""
    await redis.evaluate(_GIVE_BACK, [keys.breaker(str(target))], [owner])


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
