"""Hard budgets: money is held before a call and settled after it, over all scopes at once.

The counters live in Redis, under an epoch that lives in Postgres. Whoever finds them
missing, or of another epoch, or its window turned, puts them in place from the ledger
before anything else is held; a hold of an older epoch can pay for no call, because the
call's intent names the epoch and is refused.
"""

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import cast

from headrace_shared.dispatch import keys
from headrace_shared.dispatch.connection import Argument, Redis, Script, milliseconds, unavailable
from headrace_shared.dispatch.dispatch import Dispatch, Entry
from headrace_shared.ids import HoldId, Tenant
from headrace_shared.money import ZERO, NanoUSD
from headrace_shared.store import money
from headrace_shared.store.money import BudgetPolicy, BudgetState, Counters, WindowKind
from headrace_shared.store.pool import Database

_HOLD = Script.load("hold")
_SETTLE = Script.load("settle")
_EXPIRED = Script.load("expired_holds")
_REBUILD = Script.load("rebuild")

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
class Refused:
    """A budget that has no room for a hold."""

    scope: str
    kind: WindowKind
    limit: NanoUSD
    missing: NanoUSD
    held_by_others: NanoUSD
    ends_in: timedelta | None
    """When the window turns; None for one that never does."""
    policy: BudgetPolicy


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

    @property
    def epoch(self) -> int:
        """The epoch this process holds money under; 0 before the first hold."""
        return self._epoch

    def distrust(self) -> None:
        """Something that should have been settled was not: the counters are to be rebuilt."""
        self._run_id = ""

    async def check_epoch(self) -> None:
        """Put the counters in place anew if the store has another epoch than they have."""
        self._checked = time.monotonic()
        if self._epoch and await money.current_epoch(self._database) != self._epoch:
            await self._put_in_place(self._epoch)

    async def hold(self, requests: Sequence[HoldRequest]) -> list[Held | Refused]:
        """Hold money for calls, each over all of its scopes or not at all.

        Raises:
            DispatchUnavailable: Redis is away: nothing is held.

        """
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
        is known exactly when the rebuild saw its call open, so that it is settled once.
        """
        args: list[Argument] = []
        for settlement in settlements:
            args += (settlement.id, settlement.cost, settlement.suspense)
        for _ in range(_TRIES if args else 0):
            epoch = await self._trusted_epoch()
            if await self._redis.evaluate(_SETTLE, (), [epoch, *args]) == b"OK":
                return
            await self._put_in_place(epoch)

    async def expired_holds(self, *, limit: int = 500) -> list[HoldId]:
        """Return holds whose lease is over, to be looked up in the ledger."""
        reply = await self._redis.evaluate(_EXPIRED, (), [milliseconds(HOLD_LEASE), limit])
        return [HoldId(hold.decode()) for hold in cast("list[bytes]", reply)]

    async def set(self, scope: str, kind: WindowKind, limit: NanoUSD, policy: BudgetPolicy) -> None:
        """Set a budget; it holds from now on, for what is under way as well."""
        await money.set_budget(self._database, scope, kind, limit, policy)
        await self.rebuild()
        await self._wake_waiters(scope)

    async def remove(self, scope: str, kind: WindowKind) -> bool:
        removed = await money.remove_budget(self._database, scope, kind)
        await self.rebuild()
        await self._wake_waiters(scope)
        return removed

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
        counted = await self._redis.hash(keys.SPENT)
        held = [int(counted.get(f"{state.scope}|{state.window}|held", 0)) for state in states]
        return [BudgetView(state, NanoUSD(amount)) for state, amount in zip(states, held, strict=True)]

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
        """Raise the epoch and put the counters in place as the ledger has them."""
        async with self._rebuilding:
            await self._rebuild()

    async def _rebuild(self) -> None:
        # The order is the proof: the epoch is raised and committed first, so that every
        # intent that was accepted before is visible to the read that follows.
        epoch = await money.raise_epoch(self._database)
        read = await money.counters(self._database)
        await self._redis.check()
        run_id = self._redis.run_id
        args: list[Argument] = [epoch, run_id, milliseconds(HOLD_LEASE)]
        for pairs in (_settings(read), *_counters(read)):
            args.append(len(pairs))
            for name, value in pairs.items():
                args += (name, value)
        await self._redis.evaluate(_REBUILD, (), args)
        self._epoch, self._run_id = epoch, run_id


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
