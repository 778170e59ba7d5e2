"""What can go wrong between a client and a server: a closed vocabulary."""

from dataclasses import dataclass
from datetime import timedelta
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Latency:
    """Every piece arrives late, in either direction: by the delay, and by up to the jitter more."""

    delay: timedelta
    jitter: timedelta = timedelta(0)
    seed: int = 0
    """What the jitter is drawn from."""


@dataclass(frozen=True, slots=True)
class Drop:
    """Connections are closed in good order; new ones are accepted and closed."""


@dataclass(frozen=True, slots=True)
class BlackHole:
    """Connections stay open and new ones are accepted, but nothing passes, not even an end."""


@dataclass(frozen=True, slots=True)
class HalfOpen:
    """What the client sends arrives; the replies do not."""


@dataclass(frozen=True, slots=True)
class OneWay:
    """What the client sends does not arrive; what the server still sends does."""


@dataclass(frozen=True, slots=True)
class Reset:
    """Connections are reset, and new ones as soon as they are accepted."""


@dataclass(frozen=True, slots=True)
class Truncate:
    """Each connection is reset once so many bytes of reply have passed since the fault began."""

    after: int


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """So many bytes per second pass in each direction of each connection."""

    bytes_per_second: int

    def __post_init__(self) -> None:
        if self.bytes_per_second < 1:
            raise ValueError("a bandwidth is at least 1 byte per second; nothing at all is a BlackHole")


NetworkFault: TypeAlias = Latency | Drop | BlackHole | HalfOpen | OneWay | Reset | Truncate | Bandwidth
