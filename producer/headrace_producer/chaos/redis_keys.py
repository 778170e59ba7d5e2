"""What chaos asks about all keys of Headrace in a Redis; each reads the whole of it."""

from collections.abc import Sequence
from importlib.resources import files
from typing import cast

from headrace_shared.dispatch.connection import Redis, Script
from headrace_shared.dispatch.keys import ALL
from headrace_shared.testing.clock import script


def _load(name: str) -> Script:
    return script(files(__package__ or "").joinpath(f"{name}.lua").read_text(encoding="utf-8"))


_COUNT, _FORGET, _FIND = _load("count"), _load("forget"), _load("find")


async def count(redis: Redis) -> int:
    return cast("int", await redis.evaluate(_COUNT, (), [ALL]))


async def forget(redis: Redis) -> None:
    await redis.evaluate(_FORGET, (), [ALL])


async def find(redis: Redis, words: Sequence[str]) -> list[str]:
    """Name the keys that have a word in their names or in what they hold."""
    found = cast("list[bytes]", await redis.evaluate(_FIND, (), [ALL, *words]))
    return [key.decode(errors="replace") for key in found]
