"""Writes down how runs ended, many at a time: the store first, then the dispatch.

A batch is one statement, so that a frozen process holds no locks. One that the server
rejects is halved until the bad row stands alone. While the store is away what is to be
written is kept, because it is paid for, and written when it is back.
"""

import asyncio
import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import asyncpg

from headrace_shared.batching import Batcher
from headrace_shared.budgets import Budgets, Settlement
from headrace_shared.dispatch.dispatch import Dispatch, Entry
from headrace_shared.errors import DispatchUnavailable
from headrace_shared.ids import JobId, WorkerId
from headrace_shared.job import ClaimedJob, JobState
from headrace_shared.logs import Occasional
from headrace_shared.money import NanoUSD
from headrace_shared.outcome import Retry, Snoozed
from headrace_shared.store import money, runs
from headrace_shared.store.flights import LEADS_ON
from headrace_shared.store.pool import UNREACHABLE, Pool
from headrace_shared.store.runs import AttemptRecord, Conclusion, RunEnd
from headrace_workers.landing import Landing

_occasionally = Occasional(logging.getLogger(__name__))

MAX_DELAY = timedelta(milliseconds=2)
"""How long an answer may wait for others to be written with it; not at all when no other is out."""

MAX_BATCH = 200
MAX_BATCH_BYTES = 32 * 1024 * 1024
"""Bytes of answers in one statement; PostgreSQL takes no message of a gigabyte."""

_SHARDS = 8
_MAX_PAUSE = 2.0

REJECTED = (
    asyncpg.DataError,
    asyncpg.IntegrityConstraintViolationError,
    asyncpg.ProgramLimitExceededError,
)


@dataclass(frozen=True, slots=True)
class Finish:
    """What is to be written of one call and, when it was the last, of its run."""

    entry: Entry
    conclusion: Conclusion | None
    attempt: AttemptRecord | None
    settlement: Settlement | None
    end: RunEnd | None
    """None when the same run makes another call."""
    may_lead: bool = False
    """Others may wait for this job's answer."""
    refused_under: int = 0
    """The epoch under which a budget had no room until its window turns; 0: none refused it for so long."""


@dataclass(frozen=True, slots=True)
class _Written:
    finish: Finish
    state: JobState | None
    """What the job's row became; None when it was not this run's any more, or the run goes on."""
    corrects_suspense: bool
    """The call's hold was given up at its worst case before its bill came: only the ledger,
    not a settlement, can correct the counters."""

    @property
    def delay(self) -> timedelta | None:
        """Until the id is due again; None for an ending."""
        outcome = self.finish.end.outcome if self.finish.end else None
        if self.state is JobState.QUEUED and isinstance(outcome, Retry | Snoozed):
            return outcome.delay
        return None

    @property
    def leads_no_more(self) -> bool:
        """Whether others that wait for this job's answer must be told."""
        if not self.finish.may_lead or self.state is None:
            return False
        outcome = self.finish.end.outcome if self.finish.end else None
        return self.state.ended or (isinstance(outcome, Snoozed) and outcome.delay > LEADS_ON)


class Finisher:
    """The one way in which a worker writes what came of its runs.

    Args:
        running: the jobs whose leases are renewed; each is taken out when its end is committed.

    """

    def __init__(
        self,
        pool: Pool,
        dispatch: Dispatch,
        budgets: Budgets,
        worker: WorkerId,
        running: dict[JobId, ClaimedJob],
    ) -> None:
        self._pool = pool
        self._dispatch = dispatch
        self._budgets = budgets
        self._landing = Landing(pool, dispatch)
        self._worker = worker
        self._running = running
        self._shard = 1 + zlib.crc32(worker.encode()) % _SHARDS
        self._commits = Batcher(
            self._commit,
            max_size=MAX_BATCH,
            max_weight=MAX_BATCH_BYTES,
            weigh=_weigh,
            max_delay=MAX_DELAY,
            company=lambda pending: len(running) > pending,
            halve_on=REJECTED,
        )
        self._releases = Batcher(self._release, max_size=1000)

    async def submit(self, finish: Finish) -> bool:
        """Write it down; false when the run had lost its row, so that only the bill was booked.

        Raises:
            asyncpg.PostgresError: the server rejects this one; nothing of it was written.

        """
        written = await self._commits.submit(finish)
        return finish.end is None or written.state is not None

    async def drain(self) -> None:
        """Wait until all that was submitted is written."""
        await self._commits.drain()
        await self._releases.drain()

    async def _commit(self, batch: Sequence[Finish]) -> Sequence[_Written]:
        pause = 0.05
        while True:
            try:
                finished = await runs.finish(
                    self._pool,
                    self._worker,
                    self._shard,
                    conclusions=[one.conclusion for one in batch if one.conclusion],
                    attempts=[one.attempt for one in batch if one.attempt],
                    ends=[one.end for one in batch if one.end],
                )
            except UNREACHABLE as error:
                reason = type(error).__name__
                _occasionally.warning("the store is away (%s); %d results wait", reason, len(batch))
                await asyncio.sleep(pause)
                pause = min(2 * pause, _MAX_PAUSE)
            else:
                written = [_written(one, finished) for one in batch]
                self._forget([one.end for one in batch if one.end])
                self._follow(written)
                return written

    def _forget(self, ends: Sequence[RunEnd]) -> None:
        """Let no heartbeat renew what has ended: its id is taken out, or put back, from here on."""
        for end in ends:
            job = self._running.get(end.job_id)
            if job is not None and job.run == end.run:
                del self._running[end.job_id]

    def _follow(self, batch: Sequence[_Written]) -> None:
        """Start what follows the commit, the money and the queue; nobody has to wait for it."""
        for one in batch:
            self._releases.put(one)

    async def _release(self, batch: Sequence[_Written]) -> Sequence[None]:
        settlements = [one.finish.settlement for one in batch if one.finish.settlement]
        entries = [(one.finish.entry, one.delay) for one in batch if one.state]
        try:
            await asyncio.gather(
                self._budgets.settle(settlements), self._dispatch.finish(entries, costs=_costs(batch))
            )
            late = [one.finish.entry.id for one in batch if one.corrects_suspense]
            if late:
                await self._correct(late)
            leaders = [one.finish.entry.id for one in batch if one.leads_no_more]
            if leaders:
                await self._landing.land(leaders)
            await self._look_again([one for one in batch if one.state and one.finish.refused_under])
        except (DispatchUnavailable, *UNREACHABLE) as error:
            # The ledger has it all. Holds that stay behind here are found by their age, and
            # a Redis that comes back as another one is rebuilt; waiters look for themselves.
            _occasionally.warning("could not release in the dispatch: %s", error)
            self._budgets.distrust()
        return [None] * len(batch)

    async def _look_again(self, refused: Sequence[_Written]) -> None:
        """Wake jobs whose budget was changed before they were seen to wait for it.

        Asked after their rows say so: whoever changes it later wakes them.
        """
        if not refused:
            return
        epoch = await money.current_epoch(self._pool)
        changed = [one.finish.entry.id for one in refused if one.finish.refused_under != epoch]
        if changed:
            woken = await money.wake(self._pool, changed)
            await self._dispatch.wake([Entry(queue, job_id) for job_id, queue in woken])

    async def _correct(self, late: Sequence[JobId]) -> None:
        """Count anew after bills that came late, and let the jobs that they answer end."""
        await self._budgets.rebuild()
        answered = await runs.hasten(self._pool, late)
        await self._dispatch.wake([Entry(queue, job_id) for job_id, queue in answered])


def _weigh(finish: Finish) -> int:
    answer = finish.conclusion.answer if finish.conclusion else None
    output = finish.end.output if finish.end else None
    return len(answer or b"") + len(output or b"")


def _costs(batch: Sequence[_Written]) -> Mapping[Entry, NanoUSD]:
    """Return what runs cost, for whose turn it is next; what is in suspense counts as spent."""
    costs: dict[Entry, NanoUSD] = {}
    for one in batch:
        call = one.finish.conclusion
        cost = call.cost + call.suspense if call else 0
        if one.state or cost:
            costs[one.finish.entry] = NanoUSD(costs.get(one.finish.entry, 0) + cost)
    return costs


def _written(finish: Finish, finished: runs.Finished) -> _Written:
    state = finished.states.get((finish.end.job_id, finish.end.run)) if finish.end else None
    call = finish.conclusion
    corrects = call is not None and (call.job_id, call.run) in finished.corrected
    return _Written(finish, state, corrects)
