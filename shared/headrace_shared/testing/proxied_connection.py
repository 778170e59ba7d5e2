"""One connection through a `FaultProxy`: two directions, each with what it holds back."""

import asyncio
import random
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto

from headrace_shared.testing.network_faults import (
    Bandwidth,
    BlackHole,
    Drop,
    HalfOpen,
    Latency,
    NetworkFault,
    OneWay,
    Reset,
    Truncate,
)
from headrace_shared.testing.proxied_urls import Target

_PIECE_BYTES = 16 * 1024
_PIECES = 16  # in each direction of a connection; beyond, the sender has to wait
_TICKS_PER_SECOND = 50  # a bandwidth is kept this finely
_NO_LINGER = struct.pack("ii", 1, 0)


class Direction(Enum):
    TO_SERVER = auto()
    TO_CLIENT = auto()


class Link:
    """What all connections of a proxy share: the fault, and what it holds back."""

    def __init__(self) -> None:
        self.fault: NetworkFault | None = None
        self.began = 0
        """How often the fault has changed: tells two faults of equal values apart."""
        self.more_held = asyncio.Event()
        self._held_back: set[_Flow] = set()
        self._changed = asyncio.Event()
        self._random = random.Random()  # noqa: S311

    def change(self, fault: NetworkFault | None) -> None:
        self.fault = fault
        self.began += 1
        if isinstance(fault, Latency):
            self._random.seed(fault.seed)
        self._changed.set()
        self._changed = asyncio.Event()

    @property
    def held(self) -> int:
        return sum(flow.held for flow in self._held_back)

    def tell_held(self) -> None:
        self.more_held.set()
        self.more_held = asyncio.Event()

    def delay(self, fault: Latency) -> float:
        return (fault.delay + fault.jitter * self._random.random()).total_seconds()

    async def changes(self, held: "_Flow", seconds: float | None = None) -> bool:
        """Hold a flow back until the fault changes, for some seconds at most; return whether it did."""
        if seconds is not None and seconds <= 0:
            return False
        self._held_back.add(held)
        self.tell_held()
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            return False
        finally:
            self._held_back.discard(held)
        return True


class ProxiedConnection:
    """A client's connection and the one to the server that belongs to it."""

    def __init__(self, link: Link, target: Target, client: socket.socket) -> None:
        self.in_good_order = False
        """Whether an end from outside closes the connections or resets them."""
        self._link = link
        self._target = target
        self._client = _prepared(client)

    async def run(self) -> None:
        """Pass bytes until both sides have ended, one has reset, or this is cancelled."""
        end = reset
        there = _Flow(self._link, Direction.TO_SERVER)
        back = _Flow(self._link, Direction.TO_CLIENT)
        server: socket.socket | None = None
        try:
            async with asyncio.TaskGroup() as tasks:
                # Read before there is a server: what a client sends into a black hole is held, too.
                tasks.create_task(there.read(self._client))
                server = await self._connect(there)
                tasks.create_task(there.write(server))
                tasks.create_task(back.read(server))
                tasks.create_task(back.write(self._client))
            end = close
        except* (_Ended, OSError):
            pass
        finally:
            for connection in (self._client, server) if server else (self._client,):
                (close if self.in_good_order else end)(connection)

    async def _connect(self, there: "_Flow") -> socket.socket:
        while _holds(self._link.fault, Direction.TO_SERVER):
            await self._link.changes(there)
        return _prepared(await self._target.connect())


class _Ended(Exception):
    """One side, or a fault, has reset the connection; no error, it unwinds the connection's tasks."""


@dataclass(frozen=True, slots=True)
class _Piece:
    data: bytes
    arrived: float
    last: bool = False
    """Nothing follows: the side that sent it has ended, or has reset the connection."""
    reset: bool = False


class _Flow:
    """What passes in one direction, in order, its end included."""

    def __init__(self, link: Link, direction: Direction) -> None:
        self.held = 0
        """Bytes that were read and not written yet."""
        self._link = link
        self._direction = direction
        self._pieces: asyncio.Queue[_Piece] = asyncio.Queue(_PIECES)
        self._counted = (0, 0)  # replies: since which change of the fault, and how many bytes

    async def read(self, source: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        last = False
        while not last:
            reset = False
            try:
                data = await loop.sock_recv(source, _PIECE_BYTES)
            except OSError:
                data, reset = b"", True
            last = not data
            await self._pieces.put(_Piece(data, loop.time(), last, reset))
            self.held += len(data)
            self._link.tell_held()

    async def write(self, target: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        last = False
        while not last:
            piece = await self._pieces.get()
            rest = piece.data
            while rest:
                count = await self._allowed(len(rest), piece.arrived)
                await loop.sock_sendall(target, rest[:count])
                self.held -= count
                self._end_if_truncated()
                rest = rest[count:]
            last = piece.last
            if last:
                await self._allowed(1, piece.arrived)
            if piece.reset:
                raise _Ended
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    async def _allowed(self, count: int, arrived: float) -> int:
        """Wait until at least one byte may pass; return how many may, of so many that would."""
        link = self._link
        while True:
            began = link.began
            match link.fault:
                case fault if _holds(fault, self._direction):
                    await link.changes(self)
                case Latency() as fault:
                    due = arrived + link.delay(fault)
                    if not await link.changes(self, due - asyncio.get_running_loop().time()):
                        return count
                case Bandwidth(bytes_per_second):
                    count = min(count, max(1, bytes_per_second // _TICKS_PER_SECOND))
                    if not await link.changes(self, count / bytes_per_second):
                        return count
                case Truncate(after) if self._direction is Direction.TO_CLIENT:
                    return self._count(count, began, after)
                case _:
                    return count

    def _count(self, count: int, began: int, after: int) -> int:
        since, passed = self._counted
        passed = passed if since == began else 0
        if passed >= after:  # only where nothing at all may pass
            raise _Ended
        count = min(count, after - passed)
        self._counted = (began, passed + count)
        return count

    def _end_if_truncated(self) -> None:
        match self._link.fault:
            case Truncate(after) if self._counted == (self._link.began, after):
                raise _Ended
            case _:
                pass


def _holds(fault: NetworkFault | None, direction: Direction) -> bool:
    match fault:
        case BlackHole() | Drop() | Reset():  # of the latter two's connections, nothing passes any more
            return True
        case HalfOpen():
            return direction is Direction.TO_CLIENT
        case OneWay():
            return direction is Direction.TO_SERVER
        case Latency() | Truncate() | Bandwidth() | None:
            return False


def close(connection: socket.socket) -> None:
    """Close in good order: an end, not a reset, which bytes that nobody has read would make of it."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(_PIECE_BYTES):
            pass
    connection.close()


def reset(connection: socket.socket) -> None:
    """Close with a reset; a Unix socket knows no such thing and is just closed."""
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
    connection.close()


def _prepared(connection: socket.socket) -> socket.socket:
    connection.settimeout(0)
    if connection.family != socket.AF_UNIX:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection
