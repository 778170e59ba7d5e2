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


class WorkerAct(StrEnum):
    """What is done to a worker."""

    KILL = "worker-kill"
    FREEZE = "worker-freeze"
    REPLACE = "worker-replace"
    CLOCK_AHEAD = "worker-clock-ahead"
    CLOCK_BEHIND = "worker-clock-behind"


class ProducerAct(StrEnum):
    """What is done to a producer."""

    KILL = "producer-kill"
    KILL_BEFORE_PUSH = "producer-kill-before-push"


class ServerAct(StrEnum):
    """What is done to a server that may be anybody's."""

    TERMINATE_BACKENDS = "terminate-backends"
    FLUSHALL = "flushall"
    OOM = "oom"
    CLIENT_PAUSE = "client-pause"


class OwnServerAct(StrEnum):
    """What is done to the process or the data of a server that chaos started itself."""

    POSTGRES_RESTART = "postgres-restart"
    POSTGRES_OUTAGE = "postgres-outage"
    POSTGRES_FREEZE = "postgres-freeze"
    REDIS_KILL = "redis-kill"
    REDIS_LOSE = "redis-lose"
    REDIS_ROLLBACK = "redis-rollback"
    REDIS_OUTAGE = "redis-outage"


class ProviderAct(StrEnum):
    """How the provider behaves."""

    OUTAGE = "provider-outage"
    RATE_LIMIT = "provider-429"
    HANG = "provider-hang"
    CUT = "provider-cut"
    GARBAGE = "provider-garbage"
    SLOW = "provider-slow"


class ReceiverAct(StrEnum):
    """How a receiver behaves."""

    ERRORS = "receiver-500"
    HANG = "receiver-hang"
    RESET = "receiver-reset"


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
class NetworkAct:
    """What is done to whose network."""

    wire: Wire
    way: Way

    def __str__(self) -> str:
        return f"{self.wire}-{self.way}"


Act = WorkerAct | ProducerAct | ServerAct | OwnServerAct | ProviderAct | ReceiverAct | NetworkAct
"""What is done; as a text it is the fault's name."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that can be done, and for how many seconds."""

    act: Act
    about: str
    victim: Victim
    shortest: float
    longest: float
    needs: Needs = Needs.NOTHING
    weight: int = 1
    """How often it is drawn where others are drawn once."""

    @property
    def name(self) -> str:
        return str(self.act)

    @property
    def is_away(self) -> bool:
        """True when a worker cannot reach a server while it lasts, so that recovery may wait for its end."""
        if isinstance(self.act, NetworkAct):
            return self.act.way in (Way.WORKER_POSTGRES, Way.WORKER_REDIS)
        return self.victim in (Victim.POSTGRES, Victim.REDIS)


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

_ON_OTHERS = (
    Fault(WorkerAct.KILL, "kill -9 a worker, and start another", Victim.WORKER, 1, 4, weight=4),
    Fault(
        WorkerAct.FREEZE,
        "stop a worker for longer than its lease, and let it go on",
        Victim.WORKER,
        4.5,
        7,
        weight=3,
    ),
    Fault(WorkerAct.REPLACE, "SIGTERM a worker, and start another", Victim.WORKER, 1, 2),
    Fault(WorkerAct.CLOCK_AHEAD, "a worker whose clock is an hour ahead", Victim.WORKER, 7, 12),
    Fault(WorkerAct.CLOCK_BEHIND, "a worker whose clock is an hour behind", Victim.WORKER, 7, 12),
    Fault(ProducerAct.KILL, "kill -9 a producer, and start another", Victim.PRODUCER, 1, 3),
    Fault(
        ProducerAct.KILL_BEFORE_PUSH,
        "kill -9 a producer that has committed jobs and not yet told Redis",
        Victim.PRODUCER,
        1.5,
        3,
    ),
    Fault(
        OwnServerAct.POSTGRES_RESTART,
        "stop PostgreSQL as a crash would, and start it",
        Victim.POSTGRES,
        0.5,
        1,
        Needs.OWN_SERVERS,
    ),
    Fault(
        OwnServerAct.POSTGRES_OUTAGE,
        "PostgreSQL is away for ten seconds",
        Victim.POSTGRES,
        10,
        10,
        Needs.OWN_SERVERS,
    ),
    Fault(
        OwnServerAct.POSTGRES_FREEZE, "PostgreSQL answers nothing", Victim.POSTGRES, 2, 6, Needs.OWN_SERVERS
    ),
    Fault(
        ServerAct.TERMINATE_BACKENDS,
        "end PostgreSQL's sessions, again and again",
        Victim.POSTGRES,
        2,
        4,
        Needs.LEAVE,
    ),
    Fault(
        OwnServerAct.REDIS_KILL,
        "kill -9 Redis, and start it with its data",
        Victim.REDIS,
        0.5,
        1,
        Needs.OWN_SERVERS,
    ),
    Fault(
        OwnServerAct.REDIS_LOSE, "kill -9 Redis, and start it empty", Victim.REDIS, 0.5, 1, Needs.OWN_SERVERS
    ),
    Fault(
        OwnServerAct.REDIS_ROLLBACK,
        "kill -9 Redis, and start it with older data",
        Victim.REDIS,
        4,
        8,
        Needs.OWN_SERVERS,
    ),
    Fault(
        OwnServerAct.REDIS_OUTAGE,
        "Redis is away for fifteen seconds",
        Victim.REDIS,
        15,
        15,
        Needs.OWN_SERVERS,
    ),
    Fault(ServerAct.FLUSHALL, "everything in Redis is deleted", Victim.REDIS, 0.5, 1, Needs.LEAVE, weight=2),
    Fault(ServerAct.OOM, "Redis has no memory left for writes", Victim.REDIS, 2, 6, Needs.LEAVE),
    Fault(ServerAct.CLIENT_PAUSE, "Redis answers nobody", Victim.REDIS, 2, 6, Needs.LEAVE),
    Fault(ProviderAct.OUTAGE, "every call is answered 503", Victim.PROVIDER, 3, 6),
    Fault(ProviderAct.RATE_LIMIT, "most calls are answered 429 with Retry-After", Victim.PROVIDER, 3, 6),
    Fault(ProviderAct.HANG, "some calls are never answered", Victim.PROVIDER, 3, 6),
    Fault(ProviderAct.CUT, "some answers end in the middle", Victim.PROVIDER, 3, 6),
    Fault(ProviderAct.GARBAGE, "some answers are unreadable", Victim.PROVIDER, 3, 6),
    Fault(ProviderAct.SLOW, "answers take seconds", Victim.PROVIDER, 3, 6),
    Fault(ReceiverAct.ERRORS, "a receiver answers 500", Victim.RECEIVER, 3, 6),
    Fault(ReceiverAct.HANG, "a receiver answers nothing", Victim.RECEIVER, 3, 6),
    Fault(ReceiverAct.RESET, "a receiver resets connections", Victim.RECEIVER, 3, 6),
)


def _network_fault(wire: Wire, way: Way) -> Fault:
    about = f"{_ON_NETWORKS[wire]} between one {way.of} and {way.to}"
    return Fault(NetworkAct(wire, way), about, way.of, 3, 7)


FAULTS: Mapping[str, Fault] = {
    fault.name: fault for fault in (*_ON_OTHERS, *(_network_fault(wire, way) for way in Way for wire in Wire))
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
                raise InvalidConfiguration(where="--faults", reason=refusal(fault))
            chosen[fault.name] = fault
        if not found:
            raise InvalidConfiguration(
                where="--faults", reason=f"there is no fault {name!r} ('headrace chaos --list' names them)"
            )
    return tuple(chosen.values())


def refusal(fault: Fault) -> str:
    """Say why a fault may not be done to servers that are given."""
    if fault.needs is Needs.LEAVE:
        return (
            f"{fault.name} is done to a whole server, and yours may serve others too: "
            "add --allow-server-faults if it does not"
        )
    return f"{fault.name} needs servers of its own: unset HEADRACE_POSTGRES_URL and HEADRACE_REDIS_URL"
