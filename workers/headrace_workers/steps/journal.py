"""The intent of the call, committed before anything is sent."""

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from headrace_shared.batching import Batcher
from headrace_shared.budgets import Budgets
from headrace_shared.errors import DispatchUnavailable
from headrace_shared.outcome import Snoozed, WaitReason
from headrace_shared.scopes import scopes_of
from headrace_shared.store import runs
from headrace_shared.store.pool import UNREACHABLE, Pool
from headrace_shared.store.runs import Intent
from headrace_workers.execution import LeavesIntent, Run

_PAUSE = timedelta(milliseconds=100)


@dataclass(frozen=True, slots=True)
class _Entry:
    epoch: int
    intent: Intent


class Journal(LeavesIntent):
    """Only a call whose intent was accepted is made.

    The store refuses an intent whose hold is of an epoch that is over, and one whose row
    has moved on: both runs are put back, the second in vain, because its row is not theirs.
    """

    def __init__(self, pool: Pool, budgets: Budgets) -> None:
        self._pool = pool
        self._budgets = budgets
        self._intents = Batcher[_Entry, bool](self._write, max_size=500)

    async def __call__(self, run: Run) -> Run:
        if run.ask is None or run.held is None or run.target is None or run.price is None:
            return run
        intent = Intent(
            job_id=run.job.id,
            run=run.job.run,
            call=run.call,
            provider=run.target.provider,
            model=run.target.model,
            hold_id=run.held.id,
            held=run.held.amount,
            held_at=run.held.at,
            scopes=scopes_of(run.job, run.ask.route),
            price_version=run.price.version,
            endpoint=run.ask.endpoint,
            step=run.ask.step,
            digest=run.ask.digest,
            has_allowance=run.job.allowance is not None,
        )
        try:
            accepted = await self._written(_Entry(run.held.epoch, intent))
        except UNREACHABLE:
            # The commit may have gone through: what follows says that it was never sent.
            return run._replace(journalled=True, outcome=Snoozed(timedelta(seconds=1), WaitReason.SERVERS))
        if not accepted:
            # The epoch may have been raised by one who did not live to put the counters in place.
            with contextlib.suppress(DispatchUnavailable, *UNREACHABLE):
                await self._budgets.check_epoch()
            return run.ended(Snoozed(_PAUSE, WaitReason.EPOCH))
        return run._replace(journalled=True)

    async def _written(self, entry: _Entry) -> bool:
        # An intent that is on its way when the run is interrupted is waited for: it must not
        # arrive after it was concluded.
        writing = self._intents.put(entry)
        try:
            return await asyncio.shield(writing)
        except asyncio.CancelledError:
            while not writing.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([writing])
            if not writing.cancelled():
                writing.exception()
            raise

    async def _write(self, batch: Sequence[_Entry]) -> Sequence[bool]:
        accepted: set[object] = set()
        for epoch in {entry.epoch for entry in batch}:
            intents = [entry.intent for entry in batch if entry.epoch == epoch]
            accepted |= await runs.open_calls(self._pool, epoch, intents)
        return [(entry.intent.job_id, entry.intent.call) in accepted for entry in batch]
