"""Claims from the store itself, for the time without Redis: seldom, few at a time, and fair all the same."""

import asyncio
import random
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial

from headrace_shared.ids import JobId, Lane, WorkerId
from headrace_shared.policy import NO_TERMS, Terms
from headrace_shared.store import claims
from headrace_shared.store.claims import Abilities, Claims, DueJob
from headrace_shared.store.pool import UNREACHABLE, Pool

MOST = 50
"""Jobs that are claimed at a time."""

INTERVAL = timedelta(seconds=1)

_DUTY = 10
"""Claiming that takes long is followed by a pause of this many times as long, at least."""

_random = random.SystemRandom()


class StoreClaims:
    """What a worker claims with when it has no Redis to ask."""

    def __init__(self, pool: Pool, worker: WorkerId, abilities: Abilities) -> None:
        self._pool = pool
        self._worker = worker
        self._abilities = abilities
        self._took = 0.0

    async def claim(
        self,
        slots: int,
        lanes: Mapping[Lane, int],
        lease_of: Callable[[Lane], timedelta],
        take_suspect: Callable[[JobId], bool],
        terms: Terms = NO_TERMS,
    ) -> Claims:
        """Claim jobs that are due, as many as there are free slots but not too many.

        Args:
            slots: that are free.
            lanes: the lanes to claim from, with their weights.
            lease_of: the lease of a lane's jobs.
            take_suspect: told of jobs that are due and run only in a process of their own; says whether
                it takes a slot for one.
            terms: of the tenants.

        """
        began = time.monotonic()
        by_lease: dict[timedelta, list[JobId]] = {}
        for one in await self._pick(min(slots, MOST), lanes, terms, take_suspect):
            by_lease.setdefault(lease_of(one.lane), []).append(one.id)
        found = Claims([], None)
        for lease, ids in by_lease.items():
            # In order: two workers that picked the same rows must not wait for each other.
            try:
                taken = await claims.claim_jobs(
                    self._pool, sorted(ids), self._worker, lease, abilities=self._abilities
                )
            except UNREACHABLE:
                # What was claimed before must be run.
                if not found.jobs:
                    raise
                break
            found = Claims(found.jobs + taken.jobs, taken.configuration or found.configuration)
        self._took = time.monotonic() - began
        return found

    async def _pick(
        self, limit: int, lanes: Mapping[Lane, int], terms: Terms, take_suspect: Callable[[JobId], bool]
    ) -> list[DueJob]:
        pick = partial(claims.pick_due, self._pool, lanes, abilities=self._abilities, terms=terms)
        due = await pick(limit)
        answers = [take_suspect(one.id) for one in due if one.suspect]
        if all(answers):
            return [one for one in due if not one.suspect]
        # Those that were not taken stay at the heads of their queues: what is behind them is not to wait.
        left = limit - sum(answers)
        return await pick(left, suspects=False)

    async def rest(self) -> bool:
        """Wait until it is time to claim again; workers that do so at once do not stay together."""
        await asyncio.sleep(max(INTERVAL.total_seconds(), _DUTY * self._took) * _random.uniform(0.5, 1.5))
        return True
