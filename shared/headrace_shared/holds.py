"""Holds: money that is put aside for a call; and those that are kept in the store.

Running without Redis is an epoch too: under it holds are rows of the store, and limits are
compared there with the ledger itself.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from headrace_shared.ids import HoldId
from headrace_shared.money import ZERO, NanoUSD
from headrace_shared.store import money
from headrace_shared.store.money import Refused
from headrace_shared.store.pool import Database

HOLD_LEASE = timedelta(seconds=60)
"""A hold this old is asked about. Its call's intent follows within milliseconds; the store
refuses one that comes later than half of this."""

CHECK_EVERY = timedelta(seconds=1)
"""How often a process asks the store which epoch is in force. One that died between raising
it and putting the counters in place leaves counters that look right and pay for no call."""


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


class StoreHolds:
    """The holds of an epoch without Redis; where another one is in force, every method says None."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._epoch: int | None = None
        self._asked = -math.inf

    @property
    def believed(self) -> bool:
        """Whether the store said, when it was last asked, that the epoch is one without Redis."""
        return self._epoch is not None

    async def epoch(self) -> int | None:
        """Return the epoch in force if it is one without Redis; asked for once in a while."""
        if time.monotonic() - self._asked > CHECK_EVERY.total_seconds():
            in_force = await money.epoch_in_force(self._database)
            self._epoch = in_force.number if in_force.degraded else None
            self._asked = time.monotonic()
        return self._epoch

    async def are_in_force(self) -> bool:
        """Ask the store whether the epoch in force is one without Redis, and go by it from now on."""
        self._asked = -math.inf
        return await self.epoch() is not None

    async def hold(self, requests: Sequence[HoldRequest]) -> list[Held | Refused] | None:
        wanted = [(request.id, request.amount, request.scopes) for request in requests]
        while (epoch := await self.epoch()) is not None:
            answers = await money.hold(self._database, epoch, wanted)
            if answers is not None:
                return [
                    answer if isinstance(answer, Refused) else Held(request.id, request.amount, epoch, answer)
                    for request, answer in zip(requests, answers, strict=True)
                ]
            self._asked = -math.inf
        return None

    async def settle(self, settlements: Sequence[Settlement]) -> bool | None:
        # Asked after the ledger was written: counters that are put in place from now on have it all.
        if not await self.are_in_force():
            return None
        await money.release(self._database, [settlement.id for settlement in settlements])
        return True

    async def expired(self) -> list[HoldId] | None:
        """Give up holds that nobody can use any more; none is left to be asked about."""
        if await self.epoch() is None:
            return None
        await money.release_old(self._database, HOLD_LEASE)
        return []

    async def held(self) -> Mapping[tuple[str, str], NanoUSD] | None:
        return None if await self.epoch() is None else await money.held(self._database)

    async def nothing_to_rebuild(self) -> bool | None:
        return await self.are_in_force() or None
