"""Takes back what dead workers held: jobs whose lease ended, and money that was left behind.

It does the house's other chores as well: partitions ahead of time, retention, and gates
that nobody opened.
"""

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import partial

from headrace_shared.budgets import Budgets, Settlement
from headrace_shared.dispatch.dispatch import Dispatch, Entry
from headrace_shared.errors import DispatchUnavailable
from headrace_shared.ids import HoldId
from headrace_shared.job import JobState
from headrace_shared.money import ZERO, NanoUSD
from headrace_shared.policy import SuspenseRule
from headrace_shared.store import alerts, feed, lengths, lost, money, pauses
from headrace_shared.store.lost import Reaped
from headrace_shared.store.pool import Pool
from headrace_shared.store.suspense import BY_RULE, Decision, Meant, settle_suspense
from headrace_workers.breaker import Breakers
from headrace_workers.configured import Configured
from headrace_workers.landing import Landing

_logger = logging.getLogger(__name__)

INTERVAL = timedelta(seconds=1)
CHORES_INTERVAL = timedelta(hours=1)
LENGTHS_KEPT = timedelta(days=90)
"""What was learnt of a template that nobody uses any more."""


class Reaper:
    """Reaps; one process of the fleet at a time does it."""

    def __init__(
        self,
        pool: Pool,
        dispatch: Dispatch,
        budgets: Budgets,
        breakers: Breakers,
        configured: Configured,
        *,
        lease: timedelta,
    ) -> None:
        self._pool = pool
        self._dispatch = dispatch
        self._budgets = budgets
        self._breakers = breakers
        self._configured = configured
        self._lease = lease
        self._landing = Landing(pool, dispatch)
        self._chores_done = -CHORES_INTERVAL.total_seconds()

    async def turn(self) -> timedelta:
        """Go once through everything that may have been left behind."""
        for part in (
            self._reap_jobs,
            self._expire_jobs,
            self._landing.land_lost,
            self._settle_orphans,
            self._settle_by_rule,
            self._reap_holds,
            self._hold_breakers_open,
            self._breakers.tend_gates,
        ):
            # Each begins with the store. What Redis was not told is found by the feeder, or by its age.
            with contextlib.suppress(DispatchUnavailable):
                await part()
        if time.monotonic() - self._chores_done >= CHORES_INTERVAL.total_seconds():
            await self._do_chores()
            self._chores_done = time.monotonic()
        return INTERVAL

    async def _reap_jobs(self) -> None:
        longest = max([self._lease, *self._configured.now.configuration.lane_leases().values()])
        reaped = await lost.reap(self._pool, spare=longest)
        if not reaped:
            return
        _logger.warning(
            "%d jobs lost their worker",
            len(reaped),
            extra={"action": "reap", "jobs": len(reaped)},
        )
        # A worker that died may have held money for calls it never journalled, or not yet have
        # released what it had written down: only the ledger knows, so the counters start from it.
        await self._budgets.rebuild()
        back = [job for job in reaped if job.state is JobState.QUEUED]
        await self._dispatch.take_back([Entry(job.queue, job.id) for job in back])
        await self._announce([job for job in reaped if job.state is not JobState.QUEUED])

    async def _expire_jobs(self) -> None:
        expired = await lost.expire(self._pool)
        if expired:
            _logger.info("%d jobs expired", len(expired), extra={"action": "expire", "jobs": len(expired)})
            await self._announce(expired)

    async def _announce(self, ended: Sequence[Reaped]) -> None:
        await self._dispatch.finish([(Entry(job.queue, job.id), None) for job in ended])

    async def _settle_orphans(self) -> None:
        await self._settle_suspended(await lost.suspend_orphans(self._pool))

    async def _settle_suspended(self, holds: Mapping[HoldId, NanoUSD]) -> None:
        await self._budgets.settle([Settlement(hold, ZERO, amount) for hold, amount in holds.items()])

    async def _settle_by_rule(self) -> None:
        """Decide about calls of which nobody has learnt for long whether they were billed."""
        policy = self._configured.now.configuration.suspense_policy()
        decision = Decision(ZERO if policy.rule is SuspenseRule.FREE else None, BY_RULE)
        meant = Meant(older_than=policy.after)
        settled = await settle_suspense(self._pool, meant, decision)
        if settled:
            if policy.rule is SuspenseRule.FREE:
                await self._budgets.take_effect("global")
            else:
                # Nobody has more room by it, so nobody is woken.
                await self._budgets.rebuild()
            _logger.info(
                "%d calls in suspense were settled as %s",
                len(settled),
                policy.rule,
                extra={"action": "settle", "calls": len(settled)},
            )

    async def _reap_holds(self) -> None:
        """Settle holds that outlived their call, or never paid for one."""
        expired = await self._budgets.expired_holds()
        if not expired:
            return
        ledger = await lost.holds_in_ledger(self._pool, expired)
        leaked: list[Settlement] = []
        for hold in expired:
            known = ledger.get(hold)
            if known is None:
                leaked.append(Settlement(hold, ZERO))
            elif not known.open:
                leaked.append(Settlement(hold, known.cost, known.suspense))
        await self._budgets.settle(leaked)

    async def _hold_breakers_open(self) -> None:
        await self._breakers.hold_open(partial(pauses.in_force, self._pool))

    async def _do_chores(self) -> None:
        retention = self._configured.now.configuration.defaults.retention
        await feed.make_partitions(self._pool)
        dropped = await feed.drop_partitions(self._pool, older_than=retention)
        await feed.forget_expired(self._pool, older_than=retention)
        await money.forget_spend(self._pool, older_than=retention)
        await alerts.forget_alerts(self._pool, older_than=retention)
        await lengths.forget_lengths(self._pool, unseen_for=LENGTHS_KEPT)
        if dropped:
            _logger.info("retention dropped the weeks %s", ", ".join(dropped))
