"""Limits of providers: what is configured, what a provider says, and what calls came to.

A limiter is a provider, or one model of a provider (a target). A call needs room at both.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from urllib.parse import quote


class LimitKind(StrEnum):
    REQUESTS = "requests"
    TOKENS = "tokens"


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What a limiter may let through at most; None is no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a provider says of one of its limits in the headers of an answer."""

    limit: int
    """A minute."""
    remaining: int | None = None
    whole_in: timedelta | None = None
    """Until nothing of it is used any more."""


@dataclass(frozen=True, slots=True)
class Told:
    """What an answer's headers say of the provider's limits."""

    requests: Allowance | None = None
    tokens: Allowance | None = None


def limiter_name(text: str) -> str:
    """Return the limiter of a provider, or of ``provider/model``, as the dispatch names it."""
    provider, slash, model = text.partition("/")
    return f"{provider}{slash}{quote(model, safe='')}"


_UNIT_SECONDS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001, "us": 0.000001, "ns": 0.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|us|ns|d|h|m|s)")
_RESET = re.compile(rf"(?:{_PART.pattern})+")
_LARGEST = 10**12
_TOKENS_EXCEEDED = re.compile(r"\btokens?\b|\bTPM\b", re.IGNORECASE)


def read_told(headers: Mapping[str, str]) -> Told | None:
    """Read ``x-ratelimit-*``; None where there are none, and nonsense counts as absent."""
    requests, tokens = _allowance(headers, "requests"), _allowance(headers, "tokens")
    return None if requests is None and tokens is None else Told(requests, tokens)


def exceeded_kind(told: Told | None, message: str) -> LimitKind:
    """Say which limit a refusal is about: the one with nothing left, else the one its message names."""
    if told is not None:
        for kind, allowance in ((LimitKind.TOKENS, told.tokens), (LimitKind.REQUESTS, told.requests)):
            if allowance is not None and allowance.remaining == 0:
                return kind
    return LimitKind.TOKENS if _TOKENS_EXCEEDED.search(message) else LimitKind.REQUESTS


def _allowance(headers: Mapping[str, str], kind: str) -> Allowance | None:
    limit = _count(headers.get(f"x-ratelimit-limit-{kind}"))
    if not limit:
        return None
    whole_in = _duration(headers.get(f"x-ratelimit-reset-{kind}", ""))
    return Allowance(limit, _count(headers.get(f"x-ratelimit-remaining-{kind}")), whole_in)


def _count(text: str | None) -> int | None:
    if text is None or len(text) > len(str(_LARGEST)) or not text.isascii() or not text.isdigit():
        return None
    return int(text)


def _duration(text: str) -> timedelta | None:
    """Read ``6m0s``, ``12ms``, ``1.5s``, or plain seconds."""
    if len(text) > 32:  # noqa: PLR2004 - nothing that is meant to be read
        return None
    if not _RESET.fullmatch(text):
        return timedelta(seconds=float(text)) if re.fullmatch(r"\d{1,6}(\.\d+)?", text) else None
    seconds = sum(float(number) * _UNIT_SECONDS[unit] for number, unit in _PART.findall(text))
    return timedelta(seconds=seconds) if seconds < 7 * 86400 else None
