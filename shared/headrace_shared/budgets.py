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
from datetime import datetime, timedelta
from functools import partial
from typing import TypeVar, cast

from headrace_shared.budget_counters import FORMAT, counters_of, read_answer, read_whole, settings_of
from headrace_shared.dispatch import keys
from headrace_shared.dispatch.connection import Argument, Redis, Script, milliseconds, unavailable
from headrace_shared.dispatch.dispatch import Dispatch, Entry
from headrace_shared.errors import DispatchUnavailable, InvalidInput
from headrace_shared.holds import CHECK_EVERY, HOLD_LEASE, Held, HoldRequest, Settlement, StoreHolds
from headrace_shared.ids import HoldId, parse_hold_id
from headrace_shared.money import ZERO, NanoUSD
from headrace_shared.scopes import GLOBAL
from headrace_shared.store import money
from headrace_shared.store.money import BudgetPolicy, BudgetState, Refused, WindowKind
from headrace_shared.store.pool import Database

__all__ = ["HOLD_LEASE", "BudgetView", "Budgets", "Held", "HoldRequest", "Settlement"]

T = TypeVar("T")

_HOLD = Script.load("hold", counts_money=True)
_SETTLE = Script.load("settle", counts_money=True)
_EXPIRED = Script.load("expired_holds", counts_money=True)
_REBUILD = Script.load("rebuild", counts_money=True)
_OUTDATE = Script.load("outdate_money", counts_money=True)
_REBUILD_TURN = Script.load("rebuild_turn")
_FORGET = Script.load("forget_money")
_BEGIN = Script.load("begin_budget", counts_money=True)

_TRIES = 10
_TURN = timedelta(seconds=3)
"""After so long the others take no notice of one that is putting the counters in place."""
_LOOK_AGAIN = 0.02
_PAGE = 1000


@dataclass(frozen=True, slots=True)
class BudgetView:
    state: BudgetState
    held: NanoUSD

    @property
    def remaining(self) -> NanoUSD:
        return NanoUSD(self.state.limit - self.state.settled - self.state.suspense - self.held)


class Budgets:
    """The counters of all budgets, for one process."""

    def __init__(self, database: Database, redis: Redis) -> None:
        self._database = database
        self._redis = redis
        self._epoch = 0
        self._run_id = ""
        self._checked = -math.inf
        self._rebuilding = asyncio.Lock()
        self._in_store = StoreHolds(database)

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
        if self._in_store.believed and await self.is_without_redis():
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
            partial(self._hold_in_redis, requests), partial(self._in_store.hold, requests)
        )

    async def _either(
        self, in_redis: Callable[[], Awaitable[T]], in_store: Callable[[], Awaitable[T | None]]
    ) -> T:
        """Do it in the store where the epoch in force is one without Redis; there it gives None otherwise."""
        if self._in_store.believed:
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

    async def is_without_redis(self) -> bool:
        """Ask the store whether the epoch in force is one without Redis, and go by it from now on."""
        return await self._in_store.are_in_force()

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
            reply = await self._redis.evaluate(_HOLD, (), [epoch, milliseconds(HOLD_LEASE), FORMAT, *args])
            if self._redis.run_id != run_id:
                # The very connection of this call found another server there: what it counted
                # is an old copy, and goes with it when the counters are put in place.
                continue
            if isinstance(reply, list):
                answers = cast("list[list[int | bytes]]", reply)
                return [read_answer(*pair, epoch) for pair in zip(requests, answers, strict=True)]
            await self._put_in_place(epoch)
        raise unavailable(self._redis.address, RuntimeError("the counters of budgets did not stay in place"))

    async def settle(self, settlements: Sequence[Settlement]) -> None:
        """Turn holds into what their calls cost, after the ledger says so.

        An unknown hold was settled before. Under counters that were rebuilt meanwhile a hold
        is known exactly when the rebuild saw its call open, so that it is settled once. Where
        holds are rows of the store the ledger has counted all of it already.
        """
        await self._either(
            partial(self._settle_in_redis, settlements), partial(self._in_store.settle, settlements)
        )

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
        return await self._either(partial(self._expired_in_redis, limit), self._in_store.expired)

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

    async def begin(self, scope: str, limit: NanoUSD) -> None:
        """Set a budget in total of a scope that nobody has spent from yet, as of a batch without jobs.

        It holds when this returns, and the epoch stays: its counters are known to be 0.
        """
        await money.set_budget(self._database, scope, WindowKind.TOTAL, limit, BudgetPolicy.WAIT)
        # Asked after the commit: a rebuild that begins later reads the budget, one that has begun has
        # raised the epoch, and of the counters of an older one the script says that they are stale.
        epoch = await money.epoch_in_force(self._database)
        if epoch.degraded:
            return
        args: list[Argument] = [epoch.number, self._redis.run_id, FORMAT, scope, limit, BudgetPolicy.WAIT]
        with contextlib.suppress(DispatchUnavailable):
            if await self._redis.evaluate(_BEGIN, (), args) == b"OK":
                return
        await self.take_effect(scope)

    async def set_time_zone(self, name: str) -> datetime:
        """Count days, weeks and months in another time zone; return from when on.

        What was spent before stays in the windows in which it was held; a window that goes on under
        the same name goes on with what it has.

        Raises:
            InvalidInput: there is no such zone.

        """
        since = await money.set_time_zone(self._database, name)
        if since is None:
            raise InvalidInput(
                reason=f"{name!r} is not a time zone: write one such as Europe/Berlin, or UTC."
            )
        await self.take_effect(GLOBAL)
        return since

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
            entries = [Entry(queue, job_id) for job_id, queue in woken]
            await dispatch.wake(entries)
            if len(woken) < _PAGE:
                return

    async def view(self) -> list[BudgetView]:
        """Return every budget with what is settled, held and in suspense now."""
        states = await money.budget_state(self._database)
        held = await self._either(self._held_in_redis, self._in_store.held)
        return [BudgetView(state, held.get((state.scope, state.window), ZERO)) for state in states]

    async def _held_in_redis(self) -> Mapping[tuple[str, str], NanoUSD]:
        counted = await self._redis.hash(keys.SPENT)
        parts = {tuple(name.rsplit("|", 2)): value for name, value in counted.items()}
        return {
            (name[0], name[1]): NanoUSD(read_whole(value))
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
        """Adopt the counters that are in place, or rebuild them; one task of the fleet does."""
        async with self._rebuilding:
            if seen != self._epoch and self._run_id == self._redis.run_id:
                return
            while not await self._adopt(seen):
                if await self._take_turn():
                    await self._in_turn(seen)
                    return
                await asyncio.sleep(_LOOK_AGAIN)

    async def _in_turn(self, seen: int) -> None:
        try:
            # Whose turn it was before may have done it meanwhile.
            if not await self._adopt(seen):
                await self._rebuild()
        finally:
            await self._end_turn()

    async def _adopt(self, seen: int) -> bool:
        """Go by the counters that are in place, if they are of the epoch in force and not those of before."""
        in_place = await self._redis.hash(keys.MONEY)
        epoch = await money.current_epoch(self._database)
        expected = {"epoch": str(epoch), "run_id": self._redis.run_id, "format": FORMAT}
        if epoch in (seen, self._epoch) or not expected.items() <= in_place.items():
            return False
        self._epoch, self._run_id = epoch, self._redis.run_id
        return True

    async def _take_turn(self) -> bool:
        return await self._redis.evaluate(_REBUILD_TURN, (), [milliseconds(_TURN)]) == 1

    async def _end_turn(self) -> None:
        with contextlib.suppress(DispatchUnavailable):
            await self._redis.administer("DEL", keys.REBUILDING)

    async def rebuild(self) -> None:
        """Raise the epoch and put the counters in place as the ledger has them.

        Without Redis there is nothing to put in place.

        Raises:
            DispatchUnavailable: Redis is away, and the epoch is not one without it.

        """
        await self._either(self._rebuild_in_redis, self._in_store.nothing_to_rebuild)

    async def _rebuild_in_redis(self) -> bool:
        async with self._rebuilding:
            while not await self._take_turn():  # noqa: ASYNC110 - it is another process that ends it
                await asyncio.sleep(_LOOK_AGAIN)
            try:
                await self._rebuild()
            finally:
                await self._end_turn()
        return True

    async def _rebuild(self) -> None:
        # Who cannot write there must not end an epoch without Redis.
        await self._redis.check_writable()
        # The order is the proof: the epoch is raised and committed before the ledger is read, so
        # that every intent that was accepted before is visible to the read that follows.
        # The counters of before are void by then as well: what was settled in them later than the
        # read would come back as held.
        epoch = await money.raise_epoch(self._database)
        await self._redis.evaluate(_OUTDATE, (), [epoch])
        read = await money.counters(self._database)
        await self._redis.check()
        run_id = self._redis.run_id
        args: list[Argument] = [epoch, run_id, milliseconds(HOLD_LEASE)]
        for pairs in (settings_of(read), *counters_of(read)):
            args.append(len(pairs))
            for name, value in pairs.items():
                args += (name, value)
        in_place = await self._redis.evaluate(_REBUILD, (), args)
        # What is in place may be newer than this rebuild, but never than the store.
        if isinstance(in_place, int) and in_place > await money.current_epoch(self._database):
            await self._redis.evaluate(_FORGET)
            await self._redis.evaluate(_REBUILD, (), args)
        self._epoch, self._run_id = epoch, run_id
