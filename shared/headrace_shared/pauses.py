"""Pauses: an operator keeps jobs back, or a target from being called, until told otherwise.

The rows in Postgres decide, and each claim looks at them. Redis has a closed gate, or an open breaker,
for each of them, so that queues wait as a whole and not job by job; what it lost of these is put in
place again within a second or two.
"""

from datetime import timedelta
from urllib.parse import quote

from headrace_shared.dispatch.dispatch import Dispatch, Gate, GateReason
from headrace_shared.errors import DispatchUnavailable
from headrace_shared.routes import Target
from headrace_shared.store import pauses
from headrace_shared.store.pauses import Pause
from headrace_shared.store.pool import Database

EVERYTHING = "global"
LANE, TENANT, MODEL, TARGET = "lane", "tenant", "model", "target"

_SAME_TIME = timedelta(seconds=5)
"""What the clocks of both servers may differ by without a gate being closed anew."""


def target_scope(target: Target) -> str:
    return f"{TARGET}:{target}"


def paused_target(pause: Pause) -> Target | None:
    """Return the target whose breaker is held open; None for a pause of jobs."""
    kind, _, name = pause.scope.partition(":")
    return Target.parse(name) if kind == TARGET else None


def gate_of_scope(scope: str) -> Gate | None:
    """Return the gate that is closed while a scope is paused; None for a target, which has a breaker."""
    kind, _, name = scope.partition(":")
    dimensions = {
        EVERYTHING: EVERYTHING,
        LANE: scope,
        TENANT: f"tenant:{quote(name, safe='')}",
        MODEL: f"route:{quote(name, safe='')}",
    }
    dimension = dimensions.get(kind)
    return None if dimension is None else Gate(dimension, GateReason.PAUSE)


class Pauses:
    """Pauses of jobs, in both stores."""

    def __init__(self, database: Database, dispatch: Dispatch) -> None:
        self._database = database
        self._dispatch = dispatch

    async def pause(self, scope: str, duration: timedelta | None = None) -> Pause:
        """Begin no job of a scope from now on, for a time or until it is resumed; what runs goes on."""
        pause = await pauses.pause(self._database, scope, duration)
        gate = gate_of_scope(scope)
        if gate is not None:
            await self._try(gate, duration, close=True)
        return pause

    async def resume(self, scope: str) -> bool:
        """Let the jobs of a scope go on at once; false when it was not paused."""
        resumed = await pauses.resume(self._database, scope)
        gate = gate_of_scope(scope)
        if gate is not None:
            await self._try(gate, None, close=False)
        return resumed

    async def _try(self, gate: Gate, duration: timedelta | None, *, close: bool) -> None:
        """Where Redis is away the rows hold all the same, and the feeder puts the gates in place later."""
        try:
            if close:
                await self._dispatch.close_gate(gate, duration)
            else:
                await self._dispatch.open_gate(gate)
        except DispatchUnavailable:
            return

    async def put_in_place(self) -> None:
        """Close the gates of what is paused, and open those of pauses that are over."""
        # Gates first: one whose row comes after this look is not closed yet, and is not taken for one
        # that was left behind.
        closed = {
            gate.dimension: gate.opens_in
            for gate in await self._dispatch.closed_gates()
            if gate.reason is GateReason.PAUSE
        }
        wanted = {
            gate: pause.left
            for pause in await pauses.in_force(self._database)
            if (gate := gate_of_scope(pause.scope)) is not None
        }
        for dimension in closed.keys() - {gate.dimension for gate in wanted}:
            await self._dispatch.open_gate(Gate(dimension, GateReason.PAUSE))
        for gate, left in wanted.items():
            if gate.dimension not in closed or not _is_same(closed[gate.dimension], left):
                await self._dispatch.close_gate(gate, left)


def _is_same(one: timedelta | None, other: timedelta | None) -> bool:
    if one is None or other is None:
        return one is other
    return abs(one - other) < _SAME_TIME
