"""The fleet's side of limits: one hash per limiter, changed by scripts only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import cast
from urllib.parse import quote, unquote

from headrace_shared.dispatch.connection import Argument, Redis, Script, milliseconds
from headrace_shared.limits import Allowance, Ceiling, LimitKind, Told, limiter_name
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
class View:
    """How a limiter stands, for people."""

    standing: Standing
    learned: Ceiling
    configured: Ceiling
    used: Ceiling
    """Of late, a minute; calls under way where their number is limited."""
    is_cut: bool
    """Whether less than the limit is used because calls were refused, or somebody else uses it as well."""


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
    """Since the latest of those calls was sent that were refused."""
    given_back: list[str] = field(default_factory=list[str])
    kept: list[str] = field(default_factory=list[str])


def limiter_of(target: Target) -> str:
    return limiter_name(str(target))


def display_name(limiter: str) -> str:
    return unquote(limiter)


async def publish(
    redis: Redis,
    version: int,
    ceilings: Mapping[str, Ceiling],
    routes: Mapping[str, Sequence[Target]],
    default_provider: str | None,
) -> None:
    """Put the limits of a configuration in force, unless those of a newer one are.

    Args:
        redis: the server.
        version: of the configuration.
        ceilings: by limiter.
        routes: the targets of each route that is configured.
        default_provider: where a model without a route goes; None for nowhere.

    """
    args: list[Argument] = [version]
    for name, ceiling in ceilings.items():
        caps = (ceiling.requests_per_minute, ceiling.tokens_per_minute, ceiling.concurrent)
        args += (f"cap:{name}", " ".join("-" if cap is None else str(cap) for cap in caps))
    for name, targets in routes.items():
        args += (f"route:{quote(name, safe='')}", " ".join(limiter_of(target) for target in targets))
    if default_provider is not None:
        args += ("default", default_provider)
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


async def view(redis: Redis, limiters: Sequence[str]) -> list[View]:
    """Return how limiters stand."""
    reply = cast("list[list[int | bytes]]", await redis.evaluate(_VIEW, (), list(limiters)))
    views: list[View] = []
    for one in reply:
        told_requests, told_tokens, cap_requests, cap_tokens, requests, tokens, under_way, is_cut = (
            int(value) for value in one[6:]
        )
        standing = _standing(one[:6])
        views.append(
            View(
                standing,
                learned=Ceiling(_known(told_requests), _known(told_tokens)),
                configured=Ceiling(_known(cap_requests), _known(cap_tokens), standing.concurrent),
                used=Ceiling(requests, tokens, under_way),
                is_cut=bool(is_cut),
            )
        )
    return views


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
