"""What chaos can do to a run: a closed vocabulary of faults, and what each of them needs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase

from headrace_shared.errors import InvalidConfiguration


class Victim(StrEnum):
    """Who a fault is done to; of some there are several."""

    WORKER = "worker"
    PRODUCER = "producer"
    POSTGRES = "postgres"
    REDIS = "redis"
    PROVIDER = "provider"
    RECEIVER = "receiver"


class Needs(StrEnum):
    """Where a fault may be done."""

    NOTHING = "anywhere"
    """It harms nobody but chaos' own processes."""
    LEAVE = "a whole server: on given ones only with --allow-server-faults"
    OWN_SERVERS = "servers of its own"


class Act(StrEnum):
    """What is done, other than to a network."""

    WORKER_KILL = "worker-kill"
    WORKER_FREEZE = "worker-freeze"
    WORKER_REPLACE = "worker-replace"
    WORKER_CLOCK_AHEAD = "worker-clock-ahead"
    WORKER_CLOCK_BEHIND = "worker-clock-behind"
    PRODUCER_KILL = "producer-kill"
    PRODUCER_KILL_BEFORE_PUSH = "producer-kill-before-push"
    POSTGRES_RESTART = "postgres-restart"
    POSTGRES_OUTAGE = "postgres-outage"
    POSTGRES_FREEZE = "postgres-freeze"
    TERMINATE_BACKENDS = "terminate-backends"
    REDIS_KILL = "redis-kill"
    REDIS_LOSE = "redis-lose"
    REDIS_ROLLBACK = "redis-rollback"
    REDIS_OUTAGE = "redis-outage"
    FLUSHALL = "flushall"
    OOM = "oom"
    CLIENT_PAUSE = "client-pause"
    PROVIDER_OUTAGE = "provider-outage"
    PROVIDER_RATE_LIMIT = "provider-429"
    PROVIDER_HANG = "provider-hang"
    PROVIDER_CUT = "provider-cut"
    PROVIDER_GARBAGE = "provider-garbage"
    PROVIDER_SLOW = "provider-slow"
    RECEIVER_ERRORS = "receiver-500"
    RECEIVER_HANG = "receiver-hang"
    RECEIVER_RESET = "receiver-reset"


class Wire(StrEnum):
    """What is done to a network."""

    LATENCY = "latency"
    DROP = "drop"
    BLACK_HOLE = "black-hole"
    HALF_OPEN = "half-open"
    ONE_WAY = "one-way"
    RESET = "reset"
    TRUNCATE = "truncate"
    BANDWIDTH = "bandwidth"


class Way(StrEnum):
    """Whose way to whom it is done on."""

    WORKER_POSTGRES = "worker-postgres"
    WORKER_REDIS = "worker-redis"
    WORKER_PROVIDER = "worker-provider"
    PRODUCER_POSTGRES = "producer-postgres"
    PRODUCER_REDIS = "producer-redis"

    @property
    def of(self) -> Victim:
        return Victim(self.value.split("-")[0])

    @property
    def to(self) -> Victim:
        return Victim(self.value.split("-")[1])


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that can be done, and for how many seconds."""

    name: str
    about: str
    act: Act | Wire
    victim: Victim
    shortest: float
    longest: float
    needs: Needs = Needs.NOTHING
    way: Way | None = None
    """Of a network fault."""
    weight: int = 1
    """How often it is drawn where others are drawn once."""

    @property
    def is_away(self) -> bool:
        """True when a worker cannot reach a server while it lasts, so that recovery may wait for its end."""
        return self.victim in (Victim.POSTGRES, Victim.REDIS) or self.way in (
            Way.WORKER_POSTGRES,
            Way.WORKER_REDIS,
        )


_ON_NETWORKS: Mapping[Wire, str] = {
    Wire.LATENCY: "everything arrives late",
    Wire.DROP: "connections are closed",
    Wire.BLACK_HOLE: "nothing passes",
    Wire.HALF_OPEN: "replies do not arrive",
    Wire.ONE_WAY: "requests do not arrive",
    Wire.RESET: "connections are reset",
    Wire.TRUNCATE: "connections are reset in the middle of a reply",
    Wire.BANDWIDTH: "little passes at a time",
}

_ACTS = (
    Fault(
        "worker-kill", "kill -9 a worker, and start another", Act.WORKER_KILL, Victim.WORKER, 1, 4, weight=4
    ),
    Fault(
        "worker-freeze",
        "stop a worker for longer than its lease, and let it go on",
        Act.WORKER_FREEZE,
        Victim.WORKER,
        4.5,
        7,
        weight=3,
    ),
    Fault("worker-replace", "SIGTERM a worker, and start another", Act.WORKER_REPLACE, Victim.WORKER, 1, 2),
    Fault(
        "worker-clock-ahead",
        "a worker whose clock is an hour ahead",
        Act.WORKER_CLOCK_AHEAD,
        Victim.WORKER,
        7,
        12,
    ),
    Fault(
        "worker-clock-behind",
        "a worker whose clock is an hour behind",
        Act.WORKER_CLOCK_BEHIND,
        Victim.WORKER,
        7,
        12,
    ),
    Fault("producer-kill", "kill -9 a producer, and start another", Act.PRODUCER_KILL, Victim.PRODUCER, 1, 3),
    Fault(
        "producer-kill-before-push",
        "kill -9 a producer that has committed jobs and not yet told Redis",
        Act.PRODUCER_KILL_BEFORE_PUSH,
        Victim.PRODUCER,
        1.5,
        3,
    ),
    Fault(
        "postgres-restart",
        "stop PostgreSQL as a crash would, and start it",
        Act.POSTGRES_RESTART,
        Victim.POSTGRES,
        0.5,
        1,
        Needs.OWN_SERVERS,
    ),
    Fault(
        "postgres-outage",
        "PostgreSQL is away for ten seconds",
        Act.POSTGRES_OUTAGE,
        Victim.POSTGRES,
        10,
        10,
        Needs.OWN_SERVERS,
    ),
    Fault(
        "postgres-freeze",
        "PostgreSQL answers nothing",
        Act.POSTGRES_FREEZE,
        Victim.POSTGRES,
        2,
        6,
        Needs.OWN_SERVERS,
    ),
    Fault(
        "terminate-backends",
        "end PostgreSQL's sessions, again and again",
        Act.TERMINATE_BACKENDS,
        Victim.POSTGRES,
        2,
        4,
        Needs.LEAVE,
    ),
    Fault(
        "redis-kill",
        "kill -9 Redis, and start it with its data",
        Act.REDIS_KILL,
        Victim.REDIS,
        0.5,
        1,
        Needs.OWN_SERVERS,
    ),
    Fault(
        "redis-lose",
        "kill -9 Redis, and start it empty",
        Act.REDIS_LOSE,
        Victim.REDIS,
        0.5,
        1,
        Needs.OWN_SERVERS,
    ),
    Fault(
        "redis-rollback",
        "kill -9 Redis, and start it with older data",
        Act.REDIS_ROLLBACK,
        Victim.REDIS,
        4,
        8,
        Needs.OWN_SERVERS,
    ),
    Fault(
        "redis-outage",
        "Redis is away for fifteen seconds",
        Act.REDIS_OUTAGE,
        Victim.REDIS,
        15,
        15,
        Needs.OWN_SERVERS,
    ),
    Fault(
        "flushall",
        "everything in Redis is deleted",
        Act.FLUSHALL,
        Victim.REDIS,
        0.5,
        1,
        Needs.LEAVE,
        weight=2,
    ),
    Fault("oom", "Redis has no memory left for writes", Act.OOM, Victim.REDIS, 2, 6, Needs.LEAVE),
    Fault("client-pause", "Redis answers nobody", Act.CLIENT_PAUSE, Victim.REDIS, 2, 6, Needs.LEAVE),
    Fault("provider-outage", "every call is answered 503", Act.PROVIDER_OUTAGE, Victim.PROVIDER, 3, 6),
    Fault(
        "provider-429",
        "most calls are answered 429 with Retry-After",
        Act.PROVIDER_RATE_LIMIT,
        Victim.PROVIDER,
        3,
        6,
    ),
    Fault("provider-hang", "some calls are never answered", Act.PROVIDER_HANG, Victim.PROVIDER, 3, 6),
    Fault("provider-cut", "some answers end in the middle", Act.PROVIDER_CUT, Victim.PROVIDER, 3, 6),
    Fault("provider-garbage", "some answers are unreadable", Act.PROVIDER_GARBAGE, Victim.PROVIDER, 3, 6),
    Fault("provider-slow", "answers take seconds", Act.PROVIDER_SLOW, Victim.PROVIDER, 3, 6),
    Fault("receiver-500", "a receiver answers 500", Act.RECEIVER_ERRORS, Victim.RECEIVER, 3, 6),
    Fault("receiver-hang", "a receiver answers nothing", Act.RECEIVER_HANG, Victim.RECEIVER, 3, 6),
    Fault("receiver-reset", "a receiver resets connections", Act.RECEIVER_RESET, Victim.RECEIVER, 3, 6),
)


def _network_fault(wire: Wire, way: Way) -> Fault:
    about = f"{_ON_NETWORKS[wire]} between one {way.of} and {way.to}"
    return Fault(f"{wire}-{way}", about, wire, way.of, 3, 7, way=way)


FAULTS: Mapping[str, Fault] = {
    fault.name: fault for fault in (*_ACTS, *(_network_fault(wire, way) for way in Way for wire in Wire))
}
"""Every fault by its name."""


def choose(
    wanted: Sequence[str] | None, *, own_servers: bool, allow_server_faults: bool
) -> tuple[Fault, ...]:
    """Return the faults of a run: those that are named, by name or pattern, else all that may be done.

    Raises:
        InvalidConfiguration: a name is unknown, or may not be done to servers that are given.

    """

    def may_be_done(fault: Fault) -> bool:
        return (
            own_servers
            or fault.needs is Needs.NOTHING
            or (fault.needs is Needs.LEAVE and allow_server_faults)
        )

    if wanted is None:
        return tuple(fault for fault in FAULTS.values() if may_be_done(fault))
    chosen: dict[str, Fault] = {}
    for name in wanted:
        found = [fault for fault in FAULTS.values() if fnmatchcase(fault.name, name)]
        for fault in found:
            if not may_be_done(fault):
                raise InvalidConfiguration(where="--faults", reason=_refusal(fault))
            chosen[fault.name] = fault
        if not found:
            raise InvalidConfiguration(
                where="--faults", reason=f"there is no fault {name!r} ('headrace chaos --list' names them)"
            )
    return tuple(chosen.values())


def _refusal(fault: Fault) -> str:
    if fault.needs is Needs.LEAVE:
        return (
            f"{fault.name} is done to a whole server, and yours may serve others too: "
            "add --allow-server-faults if it does not"
        )
    return f"{fault.name} needs servers of its own: unset HEADRACE_POSTGRES_URL and HEADRACE_REDIS_URL"
