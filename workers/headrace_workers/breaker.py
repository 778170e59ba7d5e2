"""Circuit breakers that the whole fleet shares, one per provider and model.

aiobreaker decides when to open and to close; its storage and listener interfaces are
where the fleet comes in. What it lacks is here: a rolling error rate instead of a row of
failures, one leased probe instead of everybody when it is half open, and gates that keep
jobs in their queues while it is open. The one file that touches aiobreaker.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from urllib.parse import unquote

from aiobreaker import CircuitBreaker, CircuitBreakerError, CircuitBreakerListener, CircuitBreakerState
from aiobreaker.storage.base import CircuitBreakerStorage

from headrace_shared import breaker_gates
from headrace_shared.breaker_gates import gate_of, gates_of
from headrace_shared.dispatch import breakers
from headrace_shared.dispatch.dispatch import Dispatch
from headrace_shared.errors import DispatchUnavailable, InvalidRequest
from headrace_shared.ids import HoldId, RouteName
from headrace_shared.logs import Occasional
from headrace_shared.outcome import ErrorClass
from headrace_shared.pauses import paused_target
from headrace_shared.policy import BreakerPolicy
from headrace_shared.routes import Target, Trouble
from headrace_shared.store.pauses import Pause
from headrace_workers.configured import Configured
from headrace_workers.replies import Answered, Refused, Reply, Unknown
from headrace_workers.telemetry import BreakerState

_logger = logging.getLogger(__name__)
_occasionally = Occasional(_logger)
_random = random.SystemRandom()

SYNC_INTERVAL = 0.05
"""Seconds that outcomes of calls are gathered before they are shared."""

_UNHEALTHY = frozenset({ErrorClass.TRANSIENT, ErrorClass.TIMEOUT, ErrorClass.UNREADABLE})
_TURNS_OF_A_LOOK = 20
"""So many turns apart a process without news looks at what it knows of the fleet."""

Successes = Callable[[str], int]

_TRIPPED = 1
_LONG_AGO = datetime.fromtimestamp(0, UTC).replace(tzinfo=None)


@dataclass(frozen=True, slots=True)
class Permit:
    """Leave to make one call; a probe's owner is the only one whose answer closes the breaker."""

    owner: str | None = None


@dataclass(frozen=True, slots=True)
class NotNow:
    """The breaker is open: ask again after this."""

    delay: timedelta


class _Unhealthy(Exception):
    def __init__(self, reply: Reply) -> None:
        self.reply = reply


class FleetStorage(CircuitBreakerStorage):
    """What aiobreaker reads and writes, kept in step with Redis by its `Breaker`.

    `counter` answers the one question aiobreaker has, whether to open: it is 1 (and the
    breaker's `fail_max` is 1) when the fleet's error rate says so, else 0.
    """

    def __init__(self, name: str, policy: Callable[[], BreakerPolicy]) -> None:
        super().__init__(name)
        self._policy = policy
        self._state = CircuitBreakerState.CLOSED
        self.answered = self.failed = 0
        self.unshared_answered = self.unshared_failed = 0
        self.changes: list[CircuitBreakerState] = []

    @property
    def state(self) -> CircuitBreakerState:
        return self._state

    @state.setter
    def state(self, state: CircuitBreakerState) -> None:
        if state is not self._state and state is not CircuitBreakerState.HALF_OPEN:
            self.changes.append(state)
        self._state = state

    @property
    def is_open(self) -> bool:
        return self._state is not CircuitBreakerState.CLOSED

    def learn(self, state: CircuitBreakerState) -> None:
        """Take over what the fleet says, without announcing it."""
        self._state = state

    def increment_counter(self) -> None:
        self.unshared_failed += 1

    def reset_counter(self) -> None:
        """Not only answers come here: closing does as well. `_Announcer` counts answers."""

    @property
    def counter(self) -> int:
        policy = self._policy()
        failed = self.failed + self.unshared_failed
        total = failed + self.answered + self.unshared_answered
        return _TRIPPED if total >= policy.minimum_calls and failed / total >= policy.failure_rate else 0

    @property
    def opened_at(self) -> datetime:
        # Only a call that took the fleet's probe is sent through an open circuit: for it the
        # time has come.
        return _LONG_AGO

    @opened_at.setter
    def opened_at(self, date_time: datetime) -> None:
        """The fleet's clock is Redis's: nothing to keep."""


class _Announcer(CircuitBreakerListener):
    def __init__(self, storage: FleetStorage) -> None:
        self._storage = storage

    def success(self, breaker: CircuitBreaker) -> None:
        del breaker
        self._storage.unshared_answered += 1

    def state_change(self, breaker: CircuitBreaker, old: object, new: object) -> None:
        before, after = (_name(getattr(state, "state", state)) for state in (old, new))
        # Calls that were out when it opened come back one by one and find it open.
        if before != after:
            _logger.warning("breaker %s: %s -> %s", breaker.name, before, after)


def _name(state: object) -> str:
    return state.name.lower() if isinstance(state, CircuitBreakerState) else str(state)


class Breaker:
    """The breaker of one target, as one process takes part in it."""

    def __init__(
        self, target: Target, dispatch: Dispatch, configured: Configured, unshared_successes: Successes
    ) -> None:
        self.target = target
        self._unshared_successes = unshared_successes
        self._dispatch = dispatch
        self._configured = configured
        self._storage = FleetStorage(str(target), lambda: configured.now.breaker)
        self._circuit = CircuitBreaker(
            fail_max=_TRIPPED,
            timeout_duration=timedelta(0),
            state_storage=self._storage,
            listeners=[_Announcer(self._storage)],
            name=str(target),
        )
        self._worth_asking_at = 0.0
        self._alone_since = 0.0

    @property
    def is_open(self) -> bool:
        """Whether asking for leave is in vain: open, and too early for a probe as far as is known here."""
        return self._storage.is_open and time.monotonic() < self._worth_asking_at

    @property
    def state(self) -> BreakerState:
        match self._storage.state:
            case CircuitBreakerState.OPEN:
                return "open"
            case CircuitBreakerState.HALF_OPEN:
                return "half_open"
            case _:
                return "closed"

    @property
    def has_news(self) -> bool:
        """Whether there is something to share."""
        return bool(self._storage.unshared_answered or self._storage.unshared_failed)

    @property
    def is_dirty(self) -> bool:
        """Whether there is something to share, or something known of the fleet that grows old."""
        storage = self._storage
        return any((storage.unshared_answered, storage.unshared_failed, storage.answered, storage.failed))

    async def admit(self, owner: HoldId) -> Permit | NotNow:
        """Ask for leave to make a call. While the breaker is open one of the fleet gets it."""
        if not self._storage.is_open:
            return Permit()
        lease = self._configured.now.breaker.probe_lease
        try:
            verdict = await breakers.probe(self._dispatch.redis, self.target, owner, lease)
        except DispatchUnavailable:
            verdict = None
        match verdict:
            case None:
                return self._admit_alone(owner, lease)
            case breakers.Closed():
                self._storage.learn(CircuitBreakerState.CLOSED)
                return Permit()
            case breakers.Granted():
                self._learn_open(lease)
                return Permit(owner)
            case breakers.Wait(delay):
                self._learn_open(delay)
                return NotNow(delay)

    def _admit_alone(self, owner: HoldId, lease: timedelta) -> Permit | NotNow:
        """Without Redis each process has its own breaker, and a probe of its own."""
        wait = self._worth_asking_at - time.monotonic()
        if wait > 0:
            return NotNow(timedelta(seconds=wait))
        self._learn_open(lease)
        return Permit(owner)

    async def give_back(self, permit: Permit) -> None:
        """Let somebody else have the probe that was to be made with this permit, and was not sent."""
        if permit.owner is None:
            return
        self._learn_open(timedelta(0))
        try:
            await breakers.give_back(self._dispatch.redis, self.target, permit.owner)
        except DispatchUnavailable:
            _occasionally.warning("the probe of %s is free when its lease ends", self.target)

    async def call(self, permit: Permit, send: Callable[[], Awaitable[Reply]]) -> Reply:
        """Make a call that was admitted, and let its outcome count."""
        if permit.owner is None and self._storage.is_open:
            # It was admitted before the breaker opened: it goes out, and says nothing about
            # the target now.
            return await send()

        async def guarded() -> Reply:
            reply = await send()
            if is_unhealthy(reply):
                raise _Unhealthy(reply)
            return reply

        try:
            return await self._circuit.call_async(guarded)
        except _Unhealthy as error:
            return error.reply
        except CircuitBreakerError as error:
            if isinstance(error.__cause__, _Unhealthy):
                return error.__cause__.reply
            raise
        except asyncio.CancelledError:
            # aiobreaker would stay half open for ever; the probe's lease ends by itself.
            if permit.owner is not None:
                self._storage.learn(CircuitBreakerState.OPEN)
            raise
        finally:
            await self._share_changes(permit)

    async def _share_changes(self, permit: Permit) -> None:
        changes, self._storage.changes = self._storage.changes, []
        for state in changes:
            try:
                if state is CircuitBreakerState.OPEN:
                    await self._opened(permit)
                else:
                    await self._closed(permit)
            except DispatchUnavailable:
                # Redis is away and with it the fleet: what it says when it is back counts.
                _occasionally.warning("breaker %s could not be shared", self.target)

    async def _opened(self, permit: Permit) -> None:
        self._forget_counts()
        cooldown = self._configured.now.breaker.cooldown * (1 + 0.2 * _random.random())
        self._learn_open(cooldown)
        changed, remaining = await breakers.open_(self._dispatch.redis, self.target, cooldown, permit.owner)
        self._learn_open(remaining)
        if changed:
            for gate in gates_of(self._configured.now.configuration, self.target):
                await self._dispatch.close_gate(gate, remaining)

    async def _closed(self, permit: Permit) -> None:
        self._forget_counts()
        if permit.owner is not None and await breakers.close(self._dispatch.redis, self.target, permit.owner):
            for gate in gates_of(self._configured.now.configuration, self.target):
                await self._dispatch.open_gate(gate)
        else:
            # The probe's lease was over and somebody else has it, or the state was lost: the
            # fleet is asked by whoever comes next.
            self._learn_open(timedelta(0))

    async def share(self) -> None:
        """Tell the fleet what calls came to since the last time, and learn how it stands."""
        storage, window = self._storage, self._configured.now.breaker.window
        answered, storage.unshared_answered = storage.unshared_answered, 0
        failed, storage.unshared_failed = storage.unshared_failed, 0
        try:
            succeeded = self._unshared_successes(self.target.provider)
            view = await breakers.record(
                self._dispatch.redis, self.target, window, answered, failed, succeeded=succeeded
            )
        except DispatchUnavailable:
            self._count_alone(answered, failed, window)
            raise
        storage.answered, storage.failed = view.answered, view.failed
        if view.is_open and not storage.is_open:
            self._learn_open(view.reopens_in)

    def _count_alone(self, answered: int, failed: int, window: timedelta) -> None:
        if time.monotonic() - self._alone_since > window.total_seconds():
            self._storage.answered = self._storage.failed = 0
            self._alone_since = time.monotonic()
        self._storage.answered += answered
        self._storage.failed += failed

    def _learn_open(self, worth_asking_in: timedelta) -> None:
        self._storage.learn(CircuitBreakerState.OPEN)
        self._worth_asking_at = time.monotonic() + worth_asking_in.total_seconds()

    def _forget_counts(self) -> None:
        storage = self._storage
        storage.answered = storage.failed = storage.unshared_answered = storage.unshared_failed = 0


def is_unhealthy(reply: Reply) -> bool:
    """Whether a reply speaks against its target."""
    match reply:
        case Unknown():
            return True
        case Refused(failure=failure):
            return failure.error_class in _UNHEALTHY
        case Answered():
            return False


class Breakers:
    """All breakers of a process.

    Args:
        dispatch: where the fleet meets.
        configured: says when they open.
        unshared_successes: a provider's answers since it was asked last; the fleet is told of them
            with the outcomes of calls, in one round trip.

    """

    def __init__(
        self, dispatch: Dispatch, configured: Configured, unshared_successes: Successes = lambda _: 0
    ) -> None:
        self._dispatch = dispatch
        self._configured = configured
        self._unshared_successes = unshared_successes
        self._breakers: dict[Target, Breaker] = {}

    def of(self, target: Target) -> Breaker:
        breaker = self._breakers.get(target)
        if breaker is None:
            breaker = self._breakers[target] = Breaker(
                target, self._dispatch, self._configured, self._unshared_successes
            )
        return breaker

    def all(self) -> list[Breaker]:
        return list(self._breakers.values())

    async def run(self) -> None:
        """Share outcomes with the fleet until cancelled."""
        turn = 0
        while True:
            await asyncio.sleep(SYNC_INTERVAL)
            turn = (turn + 1) % _TURNS_OF_A_LOOK
            for breaker in self.all():
                if breaker.has_news or (turn == 0 and breaker.is_dirty):
                    try:
                        await breaker.share()
                    except DispatchUnavailable:
                        await asyncio.sleep(1)

    async def hold_open(self, paused: Callable[[], Awaitable[Sequence[Pause]]]) -> None:
        """Put breakers in place that an operator holds open, where Redis does not know of them."""
        configuration, redis = self._configured.now.configuration, self._dispatch.redis
        missing = [
            (target, pause.left)
            for pause in await paused()
            if (target := paused_target(pause)) and not (await breakers.view(redis, target)).by_hand
        ]
        for target, left in missing:
            await breaker_gates.hold_open(self._dispatch, configuration, target, left)
        if not missing:
            return
        # Looked at again, for one may have been closed by hand meanwhile: then it is closed here as well.
        held = {paused_target(pause) for pause in await paused()}
        for target, _ in missing:
            if target not in held:
                await breaker_gates.release(self._dispatch, configuration, target)

    async def tend_gates(self) -> None:
        """Open gates that were left closed by a process that died before it could open them."""
        configuration = self._configured.now.configuration
        for gate in await self._dispatch.gates():
            dimension, _, reason = gate.partition("|")
            kind, _, name = dimension.partition(":")
            if (kind, reason) != ("route", "breaker"):
                continue
            try:
                route = configuration.resolve_route(unquote(name))
                targets = (*route.targets, *route.fallbacks_on({Trouble.DOWN}))
            except InvalidRequest:
                # A route that is gone: its jobs have an ending to come to.
                targets = ()
            views = [await breakers.view(self._dispatch.redis, target) for target in targets]
            if not views or not all(view.is_open for view in views):
                await self._dispatch.open_gate(gate_of(RouteName(unquote(name))))
