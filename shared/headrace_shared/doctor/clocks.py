"""Three clocks: Redis' and PostgreSQL's are compared by scripts and statements, ours makes ids."""

import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import cast

from headrace_shared.dispatch.connection import Redis, Script
from headrace_shared.doctor.findings import Finding, ok, problem, warning
from headrace_shared.store.pool import Database
from headrace_shared.store.sql import Statements

_SQL = Statements("doctor.sql")
_MOMENT = Script.load("moment")

SERVERS_APART = timedelta(seconds=5)
"""A hold is made at Redis' time and refused by PostgreSQL when it is half a minute old."""
IDS_REFUSED = timedelta(minutes=5)
IDS_SUSPECT = timedelta(seconds=60)


async def examine_clocks(database: Database, redis: Redis | None) -> list[Finding]:
    """Compare clocks by how far each is from ours, half of the asking's time taken off."""
    store = await _ahead(lambda: _store_time(database))
    found = [_of_this_machine(store)]
    if redis is not None:
        found.append(_of_redis(await _ahead(lambda: _redis_time(redis)) - store))
    return found


def _of_this_machine(ahead: timedelta) -> Finding:
    check, apart = "clock of this machine", abs(ahead)
    says = f"This machine's clock is {apart.total_seconds():.1f} s from PostgreSQL's"
    if apart >= IDS_REFUSED:
        return problem(check, f"{says}: jobs made here are refused; let NTP set it.")
    if apart >= IDS_SUSPECT:
        return warning(check, f"{says}, and from five minutes jobs are refused: let NTP set it.")
    return ok(check, f"{says}.")


def _of_redis(ahead: timedelta) -> Finding:
    check, apart = "clock of redis", abs(ahead)
    says = f"Redis' clock is {apart.total_seconds():.1f} s from PostgreSQL's"
    if apart > SERVERS_APART:
        return problem(check, f"{says}: leases and holds end at the wrong time; let NTP set both.")
    return ok(check, f"{says}.")


async def _ahead(ask: Callable[[], Awaitable[float]]) -> timedelta:
    await ask()  # the first one may open a connection
    before = time.time()
    there = await ask()
    after = time.time()
    return timedelta(seconds=there - (before + after) / 2)


async def _store_time(database: Database) -> float:
    row = await database.fetchrow(_SQL["present_moment"])
    return float(row["now"]) if row else 0.0


async def _redis_time(redis: Redis) -> float:
    return cast("int", await redis.evaluate(_MOMENT)) / 1000
