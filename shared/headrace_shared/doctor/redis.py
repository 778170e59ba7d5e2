"""Redis or Valkey: what the dispatch and the budgets' counters rely on."""

from collections.abc import Mapping, Sequence
from typing import cast

from headrace_shared.dispatch import keys
from headrace_shared.dispatch.connection import Redis
from headrace_shared.doctor.findings import Finding, cannot_tell, ok, problem, warning
from headrace_shared.errors import DispatchError, DispatchTooOld, DispatchUnavailable

# What scripts and connections send; each is asked about with a key or a channel of ours.
_COMMANDS: Sequence[Sequence[str]] = (
    ("PING",),
    ("INFO", "server"),
    ("TIME",),
    ("EVAL", "return 1", "0"),
    ("EVALSHA", "0" * 40, "0"),
    ("SCRIPT", "LOAD", "return 1"),
    ("GET", keys.FED),
    ("GETDEL", keys.OWED + "x"),
    ("SET", keys.FED, "1"),
    ("BLPOP", keys.FEEDER_BELL, "1"),
    ("RPUSH", keys.FEEDER_BELL, "1"),
    ("LTRIM", keys.FEEDER_BELL, "0", "63"),
    ("LLEN", keys.FEEDER_BELL),
    ("SADD", keys.DEEP, "1"),
    ("SREM", keys.DEEP, "1"),
    ("SMEMBERS", keys.PARKED),
    ("SISMEMBER", keys.DEEP, "1"),
    ("ZADD", keys.QUEUE + "x", "1", "1"),
    ("ZINCRBY", keys.ACTIVE + "x", "1", "1"),
    ("ZRANGE", keys.WAITING, "0", "1"),
    ("ZRANGEBYSCORE", keys.HOLD_LEASES, "0", "1"),
    ("ZREM", keys.QUEUE + "x", "1"),
    ("ZSCORE", keys.QUEUE + "x", "1"),
    ("ZCARD", keys.QUEUE + "x"),
    ("ZREMRANGEBYSCORE", keys.RUNNING + "x", "0", "1"),
    ("EXISTS", keys.ACTIVE + "x"),
    ("ZCOUNT", keys.QUEUE + "x", "0", "1"),
    ("HSET", keys.MONEY, "x", "1"),
    ("HGET", keys.MONEY, "x"),
    ("HMGET", keys.BREAKER + "x", "x"),
    ("HGETALL", keys.SPENT),
    ("HINCRBY", keys.SPENT, "x", "1"),
    ("HDEL", keys.HOLDS, "x"),
    ("HKEYS", keys.GATES),
    ("HLEN", keys.GATES),
    ("DEL", keys.LANES),
    ("UNLINK", keys.LANES),
    ("PEXPIRE", keys.BREAKER + "x", "1"),
    ("SCAN", "0"),
    ("TYPE", keys.LANES),
    ("PUBLISH", keys.ENDED + "x", "1"),
    ("SUBSCRIBE", keys.ENDED + "x"),
)

Info = Mapping[str, object]


async def examine_redis(redis: Redis) -> tuple[list[Finding], bool]:
    """Look at the server; say as well whether it can be reached at all."""
    try:
        await redis.check()
    except DispatchTooOld as error:
        return [problem("redis version", error.message)], False
    except DispatchError as error:
        return [problem("redis reachable", f"{error.message} INFO and PING must be allowed, too.")], False
    info = cast("Info", await redis.administer("INFO"))
    name = "Valkey" if "valkey_version" in info else "Redis"
    version = info.get("valkey_version") or info.get("redis_version")
    return [
        ok("redis reachable", f"{name} {version} answers at {redis.address}."),
        _role(info),
        _cluster(info),
        _persistence(info),
        _eviction(info),
        await _permissions(redis),
    ], True


def _role(info: Info) -> Finding:
    if "role" not in info:
        return cannot_tell("redis role", "whether it is a replica")
    if info["role"] == "master":
        return ok("redis role", "It takes writes.")
    return problem("redis role", "It is a replica: HEADRACE_REDIS_URL must name the primary.")


def _cluster(info: Info) -> Finding:
    if "cluster_enabled" not in info:
        return cannot_tell("redis cluster", "whether it is one shard of several")
    if not int(str(info["cluster_enabled"])):
        return ok("redis cluster", "One server holds all keys.")
    return problem(
        "redis cluster", "It runs in cluster mode: scripts use many keys at once and need one that does not."
    )


def _persistence(info: Info) -> Finding:
    if "aof_enabled" not in info:
        return cannot_tell("redis persistence", "whether an append-only file is kept")
    if not int(str(info["aof_enabled"])):
        return warning(
            "redis persistence",
            "No append-only file is kept: nothing is lost with a restart, but queues and budgets are"
            " filled anew from PostgreSQL and pauses are forgotten; set appendonly yes.",
        )
    if info.get("aof_last_write_status", "ok") != "ok":
        return problem("redis persistence", "The append-only file cannot be written: free its disk.")
    return ok("redis persistence", "An append-only file is kept.")


def _eviction(info: Info) -> Finding:
    policy = info.get("maxmemory_policy")
    if policy is None:
        return cannot_tell("redis eviction", "whether keys are evicted")
    if policy == "noeviction":
        return ok("redis eviction", "Nothing is evicted.")
    says = f"maxmemory-policy is {policy}: queues and counters could vanish one by one; set noeviction."
    return problem("redis eviction", says)


async def _permissions(redis: Redis) -> Finding:
    """Ask the server what it would refuse; nothing is run."""
    check = "redis permissions"
    try:
        user = cast("bytes | str", await redis.administer("ACL", "WHOAMI"))
        name = user.decode() if isinstance(user, bytes) else user
        refused = [words for words in _COMMANDS if not await _may(redis, name, words)]
    except DispatchUnavailable:
        return cannot_tell(check, "whether its ACL allows what scripts do")
    if not refused:
        return ok(check, f"The user {name} may do all that is needed.")
    which = ", ".join(
        " ".join([words[0], *[word for word in words[1:2] if ":" in word]]) for words in refused
    )
    return problem(
        check, f"The user {name} may not: {which}; allow ~headrace:* &headrace:* and these commands."
    )


async def _may(redis: Redis, user: str, words: Sequence[str]) -> bool:
    return await redis.administer("ACL", "DRYRUN", user, *words) in (b"OK", "OK", True)
