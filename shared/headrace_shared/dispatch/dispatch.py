"""The queues in Redis: push ids, claim them fairly, put them back, take them out.

What is here is a copy of what Postgres knows, made for speed; every id in it is checked
against its row before anything is done with it.
"""

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from types import MappingProxyType
from typing import cast
from urllib.parse import quote
from uuid import UUID

from headrace_shared.dispatch import keys
from headrace_shared.dispatch.connection import Argument, Redis, Script, milliseconds
from headrace_shared.handlers import public_lane
from headrace_shared.ids import JobId, Lane
from headrace_shared.job import Queue
from headrace_shared.money import NanoUSD
from headrace_shared.policy import NO_TERMS, Terms

WINDOW = 4000
"""Ids that a queue holds in Redis at most; a deeper one waits in Postgres."""

_RENEWAL_PATIENCE = 1.0

_PUSH = Script.load("push")
_CLAIM = Script.load("claim", using=("limits",))
_TERMS = Script.load("terms")
_AFRESH = Script.load("afresh")
_RENEW = Script.load("renew")
_FINISH = Script.load("finish")
_WINDOW = Script.load("window")
_CLOSE_GATE = Script.load("close_gate")
_OPEN_GATE = Script.load("open_gate")
_GATES = Script.load("gates")
_CAPS = Script.load("caps")

_ENDED, _RUNS_ON = -1, -2
_FINISHED_AT_ONCE = 4 * 1000
_WITHOUT_TERMS = -2
_NO_COST = -1
_NONE_OF_THEIR_OWN: Mapping[Lane, timedelta] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Entry:
    """An id and the queue it is in."""

    queue: Queue
    id: JobId


_NO_COSTS: Mapping[Entry, NanoUSD] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Claim:
    entries: list[Entry]
    next_due: timedelta | None
    """When the next queue has work that has none now."""
    foreign: int
    """Members and keys that are not ours: they were taken out, and nothing else was done."""


class GateReason(StrEnum):
    """Why a gate is closed; claim.lua asks for each of them by name."""

    PAUSE = "pause"
    BREAKER = "breaker"
    BUDGET = "budget"


@dataclass(frozen=True, slots=True)
class Gate:
    """A gate keeps whole queues back: of everything, of a lane, a route, a tenant, or an API key."""

    dimension: str
    """`global`, `lane:NAME`, `route:NAME`, `tenant:NAME`, or `key:NAME`, its name percent-encoded."""
    reason: GateReason

    def __str__(self) -> str:
        return f"{self.dimension}|{self.reason}"


@dataclass(frozen=True, slots=True)
class ClosedGate:
    """A gate as it stands in Redis."""

    dimension: str
    reason: GateReason
    opens_in: timedelta | None
    """None: when somebody opens it. Nothing: a breaker's, which the next job goes through as its probe."""


@dataclass(frozen=True, slots=True)
class Cap:
    """How many jobs run under a cap."""

    running: int
    most: int | None
    """None: there is no such cap."""

    @property
    def is_full(self) -> bool:
        return self.most is not None and self.running >= self.most


def dimensions_of(queue: Queue) -> tuple[str, ...]:
    """Return the dimensions whose gates keep a queue back, as the claim script looks at them."""
    return (
        "global",
        f"lane:{public_lane(queue.lane)}",
        f"route:{quote(queue.route, safe='')}",
        f"tenant:{quote(queue.tenant, safe='')}",
        *((f"key:{quote(queue.key, safe='')}",) if queue.key else ()),
    )


class Dispatch:
    """The queues of one Redis server."""

    def __init__(self, redis: Redis, *, window: int = WINDOW) -> None:
        self.redis = redis
        self._window = window
        self._renewal = asyncio.Lock()

    async def push(
        self,
        entries: Sequence[tuple[Entry, timedelta]],
        *,
        pull_beyond: timedelta | None = None,
    ) -> None:
        """Put ids into their queues, each due after its delay, in one round trip.

        Args:
            entries: ids with their delays; what a window has no room for is left to the feeder.
            pull_beyond: what is there and is due only after this gets the new time; None: nothing does.

        """
        await self._push(entries, "keep" if pull_beyond is None else milliseconds(pull_beyond))

    async def take_back(self, entries: Sequence[Entry]) -> None:
        """Let ids be due at once whose runs have lost their rows."""
        await self._push(_at_once(entries), "replace")

    async def wake(self, entries: Sequence[Entry]) -> None:
        """Let ids that wait be due at once; one whose run is not finished here yet, as soon as it is."""
        await self._push(_at_once(entries), "wake")

    async def _push(self, entries: Sequence[tuple[Entry, timedelta]], known: Argument) -> None:
        calls: dict[str, list[Argument]] = {}
        for entry, delay in entries:
            name = keys.queue_name(entry.queue)
            call = calls.setdefault(name, [name, self._window, known])
            call += (str(entry.id), milliseconds(delay))
        if calls:
            await self.redis.evaluate_all(_PUSH, list(calls.values()))

    async def claim(
        self,
        slots: int,
        lanes: Mapping[Lane, int],
        lease: timedelta,
        probe_lease: timedelta,
        *,
        leases: Mapping[Lane, timedelta] = _NONE_OF_THEIR_OWN,
        terms: Terms = NO_TERMS,
    ) -> Claim:
        """Lease as many due ids as there are free slots, from the lanes by their weights.

        Args:
            slots: ids at most.
            lanes: the lanes to claim from, with their weights.
            lease: of an id.
            probe_lease: how long a breaker's probe keeps its gate shut for others.
            leases: of the lanes that have another than `lease`.
            terms: of the tenants and keys; put in place where those that are there are older.

        """
        args: list[Argument] = [slots, self._window, milliseconds(probe_lease), self.redis.run_id]
        args.append(terms.version)
        for lane, weight in lanes.items():
            args += (lane, weight, milliseconds(leases.get(lane, lease)))
        reply = cast("list[int | list[bytes]]", await self.redis.evaluate(_CLAIM, (), args))
        if reply[0] == _WITHOUT_TERMS:
            await self._put_in_place(terms)
            reply = cast("list[int | list[bytes]]", await self.redis.evaluate(_CLAIM, (), args))
        due, dropped = cast("list[int]", reply[:2])
        entries: list[Entry] = []
        foreign = dropped + self.redis.take_foreign()
        for batch in cast("list[list[bytes]]", reply[2:]):
            queue = keys.parse_queue_name(batch[0].decode(errors="replace"))
            for member in batch[1:]:
                job_id = _parse_id(member)
                if queue is None or job_id is None:
                    foreign += 1
                    await self.redis.remove(keys.QUEUE.encode() + batch[0], member)
                else:
                    entries.append(Entry(queue, job_id))
        wait = None if due < 0 else timedelta(milliseconds=due)
        return Claim(entries, wait, foreign)

    async def renew(self, entries: Sequence[tuple[Entry, timedelta]]) -> None:
        """Lease ids again whose rows are still owned; one that went missing is taken again.

        What is finished through this object meanwhile waits: an id that was taken out or put back must not be
        leased after that for nobody.
        """
        args: list[Argument] = []
        for entry, lease in entries:
            args += (keys.queue_name(entry.queue), str(entry.id), milliseconds(lease))
        async with self._renewal:
            await self.redis.evaluate(_RENEW, (), args)

    async def _put_in_place(self, terms: Terms) -> None:
        args: list[Argument] = [terms.version]
        for tenant, weight in terms.weights.items():
            args += (f"weight|{quote(tenant, safe='')}", weight)
        for tenant, most in terms.concurrent.items():
            args += (f"concurrent|tenant:{quote(tenant, safe='')}", most)
        for key, most in terms.keys.items():
            args += (f"concurrent|key:{quote(key, safe='')}", most)
        await self.redis.evaluate(_TERMS, (), args)

    async def finish(
        self,
        entries: Sequence[tuple[Entry, timedelta | None]],
        *,
        costs: Mapping[Entry, NanoUSD] = _NO_COSTS,
    ) -> None:
        """Take ids out whose jobs ended (delay None) and wake who waits; put the others back.

        Args:
            entries: the ids with their delays.
            costs: what runs cost that were claimed here; those among them whose ids are not in `entries` go
                on. What claims were charged for them is put right.

        """
        args: list[Argument] = []
        for entry, delay in entries:
            left = _ENDED if delay is None else milliseconds(delay)
            args += (keys.queue_name(entry.queue), str(entry.id), left, costs.get(entry, _NO_COST))
        for entry in costs.keys() - {entry for entry, _ in entries}:
            args += (keys.queue_name(entry.queue), str(entry.id), _RUNS_ON, costs[entry])
        # Waited for and not held: finishes go side by side. A renewal that begins later has none of these
        # ids, because their runs were forgotten before (Finisher._forget).
        # Not for long: what one connection that hangs may do to an id, every other would wait for.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_RENEWAL_PATIENCE), self._renewal:
                pass
        # A Lua call takes some thousands of values: all that follow one answer may end at once.
        for begin in range(0, len(args), _FINISHED_AT_ONCE):
            await self.redis.evaluate(_FINISH, (), args[begin : begin + _FINISHED_AT_ONCE])

    async def is_fed(self) -> bool:
        """Say whether what is in the queues was filled in since this server started."""
        return await self.redis.text(keys.FED) == self.redis.run_id

    async def begin_afresh(self, running: Sequence[tuple[Entry, timedelta]] = ()) -> None:
        """Empty all queues: what is in them is of another time. Gates and money are left alone.

        Args:
            running: what is leased by its row, and for how long; caps count these from the beginning.

        """
        cursor, run_id = b"0", self.redis.run_id
        while (cursor := cast("bytes", await self.redis.evaluate(_AFRESH, (), [cursor]))) != b"0":
            pass
        if running:
            await self.renew(running)
        await self.redis.set_text(keys.FED, run_id)

    async def due(self, queues: Sequence[Queue]) -> list[int]:
        """Return how many ids of each queue are due in its window."""
        if not queues:
            return []
        names = [keys.queue_name(queue) for queue in queues]
        return cast("list[int]", await self.redis.evaluate(_WINDOW, (), [self._window, *names]))

    async def wait_for_jobs(self, lanes: Sequence[Lane], timeout: timedelta) -> bool:
        """Wait until a lane has work, for some time at most."""
        return await self.redis.wait_for([keys.bell(lane) for lane in lanes], timeout.total_seconds())

    async def close_gate(self, gate: Gate, duration: timedelta | None, *, epoch: int = 0) -> None:
        """Close a gate for a time, or (None) until it is opened; where an epoch is given, under it alone."""
        for_ms = milliseconds(duration) if duration else 0
        await self.redis.evaluate(_CLOSE_GATE, (), [str(gate), for_ms, epoch or ""])

    async def open_gate(self, gate: Gate) -> bool:
        """Open a gate; false when it was open."""
        return await self.redis.evaluate(_OPEN_GATE, (), [str(gate)]) == 1

    async def gates(self) -> list[str]:
        """Return the closed gates as `dimension|reason`."""
        return sorted(await self.redis.hash(keys.GATES))

    async def closed_gates(self) -> list[ClosedGate]:
        """Return the closed gates with the time until they open by themselves; changes nothing."""
        reply = cast("list[tuple[bytes, int]]", await self.redis.evaluate(_GATES))
        found = [_closed_gate(field.decode(errors="replace"), left) for field, left in reply]
        return [gate for gate in found if gate is not None]

    async def cap(self, name: str) -> Cap:
        """Return how many jobs run under a cap (`tenant:NAME` or `key:NAME`); changes nothing."""
        kind, _, rest = name.partition(":")
        reply = await self.redis.evaluate(_CAPS, (), [f"{kind}:{quote(rest, safe='')}"])
        [[running, most]] = cast("list[list[int]]", reply)
        return Cap(running, None if most < 0 else most)


def _closed_gate(field: str, left: int) -> ClosedGate | None:
    dimension, _, name = field.rpartition("|")
    try:
        reason = GateReason(name)
    except ValueError:
        return None
    return ClosedGate(dimension, reason, None if left < 0 else timedelta(milliseconds=left))


def _parse_id(member: bytes) -> JobId | None:
    try:
        text = member.decode("ascii")
        job_id = JobId(UUID(text))
    except ValueError:
        return None
    # UUID reads other spellings too; what we put in is the one that we can take out again.
    return job_id if str(job_id) == text else None


def _at_once(entries: Sequence[Entry]) -> list[tuple[Entry, timedelta]]:
    return [(entry, timedelta(0)) for entry in entries]
