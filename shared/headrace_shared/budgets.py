"""Hard budgets: money is held before a call and settled after it, over all scopes at once.

The counters live in Redis, under an epoch that lives in Postgres. Whoever finds them
missing, or of another epoch, or its window turned, puts them in place from the ledger
before anything else is held; a hold of an older epoch can pay for no call, because the
call's intent names the epoch and is refused.

Running without Redis is an epoch too: under it holds are rows of the store, and limits are
compared there with the ledger itself. It begins and ends as any other does, so that a hold of
the one kind pays for no call in the time of the other. A process that knows of it asks Redis for
nothing until the store says that it is over: a server that hangs would keep every call waiting.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TypeVar, cast

from headrace_shared.dispatch import keys
from headrace_shared.dispatch.connection import Argument, Redis, Script, milliseconds, unavailable
from headrace_shared.dispatch.dispatch import Dispatch, Entry
from headrace_shared.errors import DispatchUnavailable
from headrace_shared.ids import HoldId, Tenant, parse_hold_id
from headrace_shared.money import ZERO, NanoUSD
from headrace_shared.store import money
from headrace_shared.store.money import BudgetPolicy, BudgetState, Counters, Refused, WindowKind
from headrace_shared.store.pool import Database

T = TypeVar("T")

_HOLD = Script.load("hold", counts_money=True)
_SETTLE = Script.load("settle", counts_money=True)
_EXPIRED = Script.load("expired_holds", counts_money=True)
_REBUILD = Script.load("rebuild", counts_money=True)
_FORGET = Script.load("forget_money")

HOLD_LEASE = timedelta(seconds=60)
"""A hold this old is asked about. Its call's intent follows within milliseconds; the store
refuses one that comes later than half of this."""

CHECK_EVERY = timedelta(seconds=1)
"""How often a process asks the store which epoch is in force. One that died between raising
it and putting the counters in place leaves counters that look right and pay for no call."""

_TRIES = 10
_PAGE = 1000


@dataclass(frozen=True, slots=True)
class HoldRequest:
    id: HoldId
    amount: NanoUSD
    scopes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Held:
    """Money that is held: under which epoch, and since when."""

    id: HoldId
    amount: NanoUSD
    epoch: int
    at: datetime


@dataclass(frozen=True, slots=True)
class Settlement:
    id: HoldId
    cost: NanoUSD
    suspense: NanoUSD = ZERO


@dataclass(frozen=True, slots=True)
class BudgetView:
    state: BudgetState
    held: NanoUSD

    @property
    def remaining(self) -> NanoUSD:
        return NanoUSD(self.state.limit - self.state.settled - self.state.suspense - self.held)


def scopes_of(tenant: Tenant) -> tuple[str, ...]:
    """Return the scopes that a tenant's job spends from."""
    return ("global", f"tenant:{tenant}")


class Budgets:
    """The counters of all budgets, for one process."""

    def __init__(self, database: Database, redis: Redis) -> None:
        self._database = database
        self._redis = redis
        self._epoch = 0
        self._run_id = ""
        self._checked = -math.inf
        self._rebuilding = asyncio.Lock()
        self._epoch_without_redis: int | None = None
        self._asked = -math.inf

    @property
    def epoch(self) -> int:
        """The epoch this process holds money under; 0 before the first hold."""
        return self._epoch

    def distrust(self) -> None:
        """Something that should have been settled was not: the counters are to be rebuilt."""
        self._run_id = ""

    async def check_epoch(self) -> None:
        """Put the counters in place anew if the store has another epoch than they have."""
        self._checked = -math.inf
        if self._epoch_without_redis is not None and await self.is_without_redis():
            return
        if self._epoch and await money.current_epoch(self._database) != self._epoch:
            await self._put_in_place(self._epoch)
        self._checked = time.monotonic()

    async def hold(self, requests: Sequence[HoldRequest]) -> list[Held | Refused]:
        """Hold money for calls, each over all of its scopes or not at all.

        Raises:
            DispatchUnavailable: Redis is away, and the epoch is not one without it: nothing is held.

        """
        return await self._either(
            partial(self._hold_in_redis, requests), partial(self._hold_in_store, requests)
        )

    async def _either(
        self, in_redis: Callable[[], Awaitable[T]], in_store: Callable[[], Awaitable[T | None]]
    ) -> T:
        """Do it in the store where the epoch in force is one without Redis; there it gives None otherwise."""
        if self._epoch_without_redis is not None:
            found = await in_store()
            if found is not None:
                return found
        try:
            return await in_redis()
        except DispatchUnavailable:
            found = await in_store()
            if found is None:
                raise
            return found

    async def _hold_in_store(self, requests: Sequence[HoldRequest]) -> list[Held | Refused] | None:
        wanted = [(request.id, request.amount, request.scopes) for request in requests]
        while (epoch := await self._without_redis()) is not None:
            answers = await money.hold(self._database, epoch, wanted)
            if answers is not None:
                return [
                    answer if isinstance(answer, Refused) else Held(request.id, request.amount, epoch, answer)
                    for request, answer in zip(requests, answers, strict=True)
                ]
            self._asked = -math.inf
        return None

    async def _without_redis(self) -> int | None:
        """Return the epoch in force if it is one without Redis; asked for once in a while."""
        if time.monotonic() - self._asked > CHECK_EVERY.total_seconds():
            in_force = await money.epoch_in_force(self._database)
            self._epoch_without_redis = in_force.number if in_force.degraded else None
            self._asked = time.monotonic()
        return self._epoch_without_redis

    async def is_without_redis(self) -> bool:
        """Ask the store whether the epoch in force is one without Redis, and go by it from now on."""
        self._asked = -math.inf
        return await self._without_redis() is not None

    async def resume(self) -> None:
        """Redis is back: end the epoch without it, if one is in force."""
        if await self.is_without_redis():
            await self._put_in_place(self._epoch)
            await self.is_without_redis()

    async def _hold_in_redis(self, requests: Sequence[HoldRequest]) -> list[Held | Refused]:
        args: list[Argument] = []
        for request in requests:
            args += (request.id, request.amount, "\n".join(request.scopes))
        for _ in range(_TRIES):
            epoch = await self._trusted_epoch()
            run_id = self._run_id
            reply = await self._redis.evaluate(_HOLD, (), [epoch, milliseconds(HOLD_LEASE), *args])
            if self._redis.run_id != run_id:
                # The very connection of this call found another server there: what it counted
                # is an old copy, and goes with it when the counters are put in place.
                continue
            if isinstance(reply, list):
                answers = cast("list[list[int | bytes]]", reply)
                return [_answer(*pair, epoch) for pair in zip(requests, answers, strict=True)]
            await self._put_in_place(epoch)
        raise unavailable(self._redis.address, RuntimeError("the counters of budgets did not stay in place"))

    async def settle(self, settlements: Sequence[Settlement]) -> None:
        """Turn holds into what their calls cost, after the ledger says so.

        An unknown hold was settled before. Under counters that were rebuilt meanwhile a hold
        is known exactly when the rebuild saw its call open, so that it is settled once. Where
        holds are rows of the store the ledger has counted all of it already.
        """
        await self._either(
            partial(self._settle_in_redis, settlements), partial(self._settle_in_store, settlements)
        )

    async def _settle_in_store(self, settlements: Sequence[Settlement]) -> bool | None:
        # Asked after the ledger was written: counters that are put in place from now on have it all.
        if not await self.is_without_redis():
            return None
        await money.release(self._database, [settlement.id for settlement in settlements])
        return True

    async def _settle_in_redis(self, settlements: Sequence[Settlement]) -> bool:
        args: list[Argument] = []
        for settlement in settlements:
            args += (settlement.id, settlement.cost, settlement.suspense)
        for _ in range(_TRIES if args else 0):
            epoch = await self._trusted_epoch()
            if await self._redis.evaluate(_SETTLE, (), [epoch, *args]) == b"OK":
                return True
            await self._put_in_place(epoch)
        return False

    async def expired_holds(self, *, limit: int = 500) -> list[HoldId]:
        """Return holds whose lease is over, to be looked up in the ledger; those in the store just go."""
        return await self._either(partial(self._expired_in_redis, limit), self._expired_in_store)

    async def _expired_in_store(self) -> list[HoldId] | None:
        if await self._without_redis() is None:
            return None
        await money.release_old(self._database, HOLD_LEASE)
        return []

    async def _expired_in_redis(self, limit: int) -> list[HoldId]:
        reply = await self._redis.evaluate(_EXPIRED, (), [milliseconds(HOLD_LEASE), limit])
        holds: list[HoldId] = []
        for member in cast("list[bytes]", reply):
            hold = parse_hold_id(member)
            if hold is None:
                await self._redis.remove(keys.HOLD_LEASES, member)
            else:
                holds.append(hold)
        return holds

    async def set(self, scope: str, kind: WindowKind, limit: NanoUSD, policy: BudgetPolicy) -> None:
        """Set a budget; it holds from now on, for what is under way as well."""
        await money.set_budget(self._database, scope, kind, limit, policy)
        await self.take_effect(scope)

    async def remove(self, scope: str, kind: WindowKind) -> bool:
        removed = await money.remove_budget(self._database, scope, kind)
        await self.take_effect(scope)
        return removed

    async def take_effect(self, scope: str) -> None:
        """Count anew after the ledger or a limit was changed by hand, and wake who waits for the scope."""
        try:
            await self.rebuild()
        except DispatchUnavailable:
            # Who reaches Redis rebuilds then; until somebody has, no call is paid for.
            await money.raise_epoch(self._database)
        # Where Redis is away they are due all the same.
        with contextlib.suppress(DispatchUnavailable):
            await self._wake_waiters(scope)

    async def _wake_waiters(self, scope: str) -> None:
        """Jobs that were put back until a window turns may fit by now: they try again."""
        dispatch = Dispatch(self._redis)
        while woken := await money.wake_waiters(self._database, scope, limit=_PAGE):
            entries = [(Entry(queue, job_id), timedelta(0)) for job_id, queue in woken]
            await dispatch.push(entries, overwrite=True)
            if len(woken) < _PAGE:
                return

    async def view(self) -> list[BudgetView]:
        """Return every budget with what is settled, held and in suspense now."""
        states = await money.budget_state(self._database)
        held = await self._either(self._held_in_redis, self._held_in_store)
        return [BudgetView(state, held.get((state.scope, state.window), ZERO)) for state in states]

    async def _held_in_store(self) -> Mapping[tuple[str, str], NanoUSD] | None:
        return None if await self._without_redis() is None else await money.held(self._database)

    async def _held_in_redis(self) -> Mapping[tuple[str, str], NanoUSD]:
        counted = await self._redis.hash(keys.SPENT)
        parts = {tuple(name.split("|")): value for name, value in counted.items()}
        return {
            (name[0], name[1]): NanoUSD(_whole(value))
            for name, value in parts.items()
            if len(name) == 3 and name[2] == "held"  # noqa: PLR2004
        }

    async def _trusted_epoch(self) -> int:
        # A server that came back as another one may have lost holds: its counters are not
        # believed, even where their epoch looks right.
        if not self._epoch or self._run_id != self._redis.run_id:
            await self._put_in_place(self._epoch)
        if time.monotonic() - self._checked > CHECK_EVERY.total_seconds():
            await self.check_epoch()
        return self._epoch

    async def _put_in_place(self, seen: int) -> None:
        """Adopt the counters that are in place, or rebuild them; one task of a process does."""
        async with self._rebuilding:
            if seen != self._epoch and self._run_id == self._redis.run_id:
                return
            in_place = await self._redis.hash(keys.MONEY)
            epoch = await money.current_epoch(self._database)
            ours = in_place.get("epoch") == str(epoch) and in_place.get("run_id") == self._redis.run_id
            if ours and epoch not in (seen, self._epoch):
                self._epoch, self._run_id = epoch, self._redis.run_id
                return
            await self._rebuild()

    async def rebuild(self) -> None:
        """Raise the epoch and put the counters in place as the ledger has them.

        Without Redis there is nothing to put in place.

        Raises:
            DispatchUnavailable: Redis is away, and the epoch is not one without it.

        """
        await self._either(self._rebuild_in_redis, self._nothing_to_rebuild)

    async def _nothing_to_rebuild(self) -> bool | None:
        return await self.is_without_redis() or None

    async def _rebuild_in_redis(self) -> bool:
        async with self._rebuilding:
            await self._rebuild()
        return True

    async def _rebuild(self) -> None:
        # Who cannot write there must not end an epoch without Redis.
        await self._redis.check_writable()
        # The order is the proof: the epoch is raised and committed before the ledger is read, so
        # that every intent that was accepted before is visible to the read that follows.
        epoch = await money.raise_epoch(self._database)
        read = await money.counters(self._database)
        await self._redis.check()
        run_id = self._redis.run_id
        args: list[Argument] = [epoch, run_id, milliseconds(HOLD_LEASE)]
        for pairs in (_settings(read), *_counters(read)):
            args.append(len(pairs))
            for name, value in pairs.items():
                args += (name, value)
        in_place = await self._redis.evaluate(_REBUILD, (), args)
        # What is in place may be newer than this rebuild, but never than the store.
        if isinstance(in_place, int) and in_place > await money.current_epoch(self._database):
            await self._redis.evaluate(_FORGET)
            await self._redis.evaluate(_REBUILD, (), args)
        self._epoch, self._run_id = epoch, run_id


def _whole(text: str | None) -> int:
    """Read a counter for somebody to look at; the next hold or settlement repairs what is none."""
    return int(text) if text is not None and text.removeprefix("-").isdecimal() else 0


def _settings(read: Counters) -> dict[str, Argument]:
    found: dict[str, Argument] = {}
    for window in read.windows:
        found[f"window|{window.kind}"] = window.name
        if window.ends_in is not None:
            # Rounded up: a window must not turn here before it does in the store.
            found[f"ends_in|{window.kind}"] = math.ceil(window.ends_in * 1000)
    for state in read.budgets:
        found[f"limit|{state.scope}|{state.kind}"] = state.limit
        found[f"policy|{state.scope}|{state.kind}"] = state.policy
    return found


def _counters(read: Counters) -> tuple[dict[str, int], dict[str, str]]:
    counters: dict[str, int] = {}
    names = {f"{state.scope}|{state.window}" for state in read.budgets}
    for state in read.budgets:
        counters[f"{state.scope}|{state.window}|settled"] = state.settled
        counters[f"{state.scope}|{state.window}|suspense"] = state.suspense
    records: dict[str, str] = {}
    for hold in read.holds:
        counted = [f"{scope}|{window}" for scope in hold.scopes for window in hold.windows]
        counted = [name for name in counted if name in names]
        for name in counted:
            counters[f"{name}|held"] = counters.get(f"{name}|held", 0) + hold.amount
        if counted:
            records[hold.id] = "\n".join([str(hold.amount), *counted])
    return counters, records


def _answer(request: HoldRequest, answer: Sequence[int | bytes], epoch: int) -> Held | Refused:
    if answer[0] == 1:
        at = datetime.fromtimestamp(int(answer[1]) / 1000, UTC)
        return Held(request.id, request.amount, epoch, at)
    _, scope, kind, limit, missing, held, ends_in, policy = answer
    return Refused(
        cast("bytes", scope).decode(),
        WindowKind(cast("bytes", kind).decode()),
        NanoUSD(int(limit)),
        NanoUSD(int(missing)),
        NanoUSD(int(held)),
        timedelta(milliseconds=int(ends_in)) if int(ends_in) >= 0 else None,
        BudgetPolicy(cast("bytes", policy).decode()),
    )
