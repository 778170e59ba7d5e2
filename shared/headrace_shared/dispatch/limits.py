"""The fleet's side of limits: one hash per limiter, changed by scripts only."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from typing import cast
from urllib.parse import quote, unquote

from headrace_shared.configuration import Configuration
from headrace_shared.dispatch import keys
from headrace_shared.dispatch.connection import Argument, Redis, Script, milliseconds
from headrace_shared.limits import Allowance, LimitKind, Told, limiter_name
from headrace_shared.routes import Target

_ADMIT = Script.load("admit", using=("limits",))
_REPORT = Script.load("report", using=("limits",))
_VIEW = Script.load("limits_view", using=("limits",))
_PUBLISH = Script.load("limits_publish")

PERMIT_LEASE = timedelta(seconds=15)
"""How long a call counts as under way that nobody renews."""

LONGEST_LEAD = timedelta(seconds=1)
"""How far ahead of its moment a call may be let go: it keeps its slot until then."""

_NONE = -1


@dataclass(frozen=True, slots=True)
class AdmitRequest:
    id: str
    target: Target
    input_bound: int
    output_bound: int


@dataclass(frozen=True, slots=True)
class Admitted:
    """The call may go, at its moment."""

    delay: timedelta
    tokens: int
    """What was reserved for it."""


@dataclass(frozen=True, slots=True)
class Wait:
    """There is no room."""

    delay: timedelta
    """Until it is worth asking again."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What is in force at a limiter; None is no limit."""

    limiter: str
    wait: timedelta
    requests_per_minute: int | None
    tokens_per_minute: int | None
    concurrent: int | None
    cooling: timedelta
    """For how long nobody is to send, because the provider refused a call."""


@dataclass(frozen=True, slots=True)
class Measure:
    """One limit of a limiter, and what is used of it."""

    what: str
    """`requests` or `tokens` a minute, or `concurrent` calls."""
    limit: int | None
    source: str
    """`configured`, `learned` where the provider says less, or `cut` where only refusals are known."""
    in_force: int | None
    """Less than the limit after refusals, and while others use it as well."""
    used: int
    """Of late."""
    wait: timedelta = timedelta(0)
    """Until a call may go by this limit alone; of calls under way nobody knows when one ends."""


@dataclass(frozen=True, slots=True)
class View:
    """How a limiter stands, for people."""

    standing: Standing
    measures: tuple[Measure, ...]
    """Of what is limited."""
    room: int | None
    """Jobs that may be claimed for it now; None for any number."""
    asked_again: timedelta
    """Until claims look again whether there is room."""


@dataclass(slots=True)
class Report:
    """What calls of one limiter came to since the last report."""

    limiter: str
    answered: int = 0
    tokens: int = 0
    reserved: int = 0
    input_tokens: int = 0
    input_bounds: int = 0
    output_tokens: int = 0
    told: Told | None = None
    told_age: timedelta = timedelta(0)
    """Since the call was sent that was answered with it."""
    refused: dict[LimitKind, int] = field(default_factory=dict[LimitKind, int])
    wait: timedelta | None = None
    """What the provider asked to wait."""
    refused_age: timedelta = timedelta(0)
    """Since the first of those calls was sent that were refused."""
    passed_by: int = 0
    """Jobs that were claimed for a call and did not come to it."""
    given_back: list[str] = field(default_factory=list[str])
    kept: list[str] = field(default_factory=list[str])


def limiter_of(target: Target) -> str:
    return limiters_of(target)[0]


@lru_cache(maxsize=1000)
def limiters_of(target: Target) -> tuple[str, str]:
    """Return the limiters that a call goes through: the target's own, and its provider's."""
    return limiter_name(str(target)), limiter_name(target.provider)


def display_name(limiter: str) -> str:
    return unquote(limiter)


async def publish(redis: Redis, version: int, configuration: Configuration) -> None:
    """Put the limits of a configuration in force, unless those of a newer one are."""
    args: list[Argument] = [version]
    for name, ceiling in configuration.ceilings().items():
        caps = (ceiling.requests_per_minute, ceiling.tokens_per_minute, ceiling.concurrent)
        args += (f"cap:{name}", " ".join("-" if cap is None else str(cap) for cap in caps))
    for name in configuration.routes:
        targets = " ".join(limiter_of(target) for target in configuration.resolve_route(name).targets)
        args += (f"route:{quote(name, safe='')}", targets)
    if configuration.defaults.any_model:
        args += ("default", configuration.defaults.provider)
    await redis.evaluate(_PUBLISH, (), args)


async def admit(
    redis: Redis, version: int, requests: Sequence[AdmitRequest], *, lead: timedelta = LONGEST_LEAD
) -> tuple[list[Admitted | Wait], list[Standing]] | None:
    """Let calls go; None when the limits of this version are not published there."""
    args: list[Argument] = [version, milliseconds(PERMIT_LEASE), milliseconds(lead)]
    for one in requests:
        args += (one.id, limiter_of(one.target), one.input_bound, one.output_bound)
    reply = await redis.evaluate(_ADMIT, (), args)
    if not isinstance(reply, list):
        return None
    verdicts, *standings = cast("list[list[list[int]]]", reply)
    decided: list[Admitted | Wait] = []
    for verdict, delay, tokens in verdicts:
        after = timedelta(milliseconds=delay)
        decided.append(Admitted(after, tokens) if verdict else Wait(after))
    return decided, [_standing(cast("list[int | bytes]", one)) for one in standings]


async def report(redis: Redis, reports: Sequence[Report]) -> list[Standing]:
    """Say what calls came to, and learn how their limiters stand."""
    args: list[Argument] = []
    for one in reports:
        args += _arguments(one)
    reply = cast("list[list[int | bytes]]", await redis.evaluate(_REPORT, (), args))
    return [_standing(standing) for standing in reply]


async def known(redis: Redis) -> list[str]:
    """Return the limiters that calls went through; reads all keys, so not for every second."""
    return [name.removeprefix(keys.LIMITER) for name in await redis.names(f"{keys.LIMITER}*")]


async def view(redis: Redis, limiters: Sequence[str]) -> list[View]:
    """Return how limiters stand."""
    reply = cast("list[list[int | bytes]]", await redis.evaluate(_VIEW, (), list(limiters)))
    return [_view(one) for one in reply]


def _view(one: Sequence[int | bytes]) -> View:
    standing = _standing(one[:6])
    told_requests, told_tokens, cap_requests, cap_tokens, requests, tokens, under_way = (
        int(value) for value in one[6:13]
    )
    by_requests, by_tokens, room, asked_again = (int(value) for value in one[13:])
    most = standing.requests_per_minute, standing.tokens_per_minute, standing.concurrent
    measures = (
        Measure("requests", *_limit(cap_requests, told_requests), most[0], requests, _after(by_requests)),
        Measure("tokens", *_limit(cap_tokens, told_tokens), most[1], tokens, _after(by_tokens)),
        Measure("concurrent", most[2], "configured", most[2], under_way),
    )
    limited = tuple(one for one in measures if one.in_force is not None)
    return View(standing, limited, _known(room), _after(asked_again))


def _limit(configured: int, learned: int) -> tuple[int | None, str]:
    """Return what is known of a limit and who says it; -1 stands for nobody."""
    if learned >= 0 and (configured < 0 or learned < configured):
        return learned, "learned"
    return _known(configured), "cut" if configured < 0 else "configured"


def _after(number: int) -> timedelta:
    return timedelta(milliseconds=number)


def _arguments(one: Report) -> list[Argument]:
    return [
        one.limiter,
        milliseconds(PERMIT_LEASE),
        one.answered,
        one.tokens,
        one.reserved,
        one.input_tokens,
        one.input_bounds,
        one.output_tokens,
        *_said(one.told.requests if one.told else None),
        *_said(one.told.tokens if one.told else None),
        milliseconds(one.told_age),
        one.refused.get(LimitKind.REQUESTS, 0),
        one.refused.get(LimitKind.TOKENS, 0),
        _NONE if one.wait is None else milliseconds(one.wait),
        milliseconds(one.refused_age),
        one.passed_by,
        len(one.given_back),
        len(one.kept),
        *one.given_back,
        *one.kept,
    ]


def _said(allowance: Allowance | None) -> tuple[int, int, int]:
    if allowance is None:
        return _NONE, _NONE, _NONE
    left = _NONE if allowance.remaining is None else allowance.remaining
    return allowance.limit, left, _NONE if allowance.whole_in is None else milliseconds(allowance.whole_in)


def _standing(one: Sequence[int | bytes]) -> Standing:
    name, wait, requests, tokens, concurrent, cooling = one
    return Standing(
        cast("bytes", name).decode(errors="replace"),
        timedelta(milliseconds=int(wait)),
        _known(int(requests)),
        _known(int(tokens)),
        _known(int(concurrent)),
        timedelta(milliseconds=int(cooling)),
    )


def _known(number: int) -> int | None:
    return None if number < 0 else number
