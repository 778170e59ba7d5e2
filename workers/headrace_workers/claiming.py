"""How a worker gets its jobs: first the ids, from the dispatch, then the rows; without Redis, the rows alone.

The row decides. Where the queue says something else than the rows it is put right here.
"""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from datetime import timedelta

from headrace_shared.dispatch.dispatch import Claim, Dispatch, Entry
from headrace_shared.errors import DispatchUnavailable, InvalidConfiguration
from headrace_shared.ids import JobId, Lane, WorkerId
from headrace_shared.money import ZERO
from headrace_shared.store import claims
from headrace_shared.store.claims import Claims, Standing, Unclaimed
from headrace_shared.store.pool import UNREACHABLE, Pool
from headrace_workers.configured import Configured
from headrace_workers.handlers.loading import NO_HANDLERS, Handlers
from headrace_workers.running import Running
from headrace_workers.store_claims import StoreClaims
from headrace_workers.suspects import Suspects
from headrace_workers.telemetry import Metrics

_logger = logging.getLogger(__name__)

POLL = timedelta(seconds=1)
"""How long a worker listens for the bell before it looks by itself."""

_MOMENT = timedelta(milliseconds=100)
_UNKNOWN_PAUSE = timedelta(seconds=5)
"""How long a job waits that this worker does not know how to run; others may."""
_SUSPECT_PAUSE = timedelta(seconds=1)
"""How long a job waits that is to run alone while this worker has enough of those; others may not."""
_UNTIL_GATES_ARE_CLOSED = timedelta(seconds=1)
"""How long a paused job waits whose queue has no closed gate: the feeder closes it meanwhile."""
_STARTING = timedelta(seconds=15)
"""How long nobody else takes a job whose own process is starting; once it has the row it renews its lease."""


class Claiming:
    """Claims jobs in bulk, each under the lease of its lane, and starts them.

    Args:
        worker: under which rows are claimed.
        lanes: the lanes served; None for all that are configured.
        lease: of a lane that has none of its own.
        running: where claimed jobs are started.
        suspects: where those are started that are to run alone.
        handlers: of the application's own, whose jobs are served in the same lanes.

    """

    def __init__(
        self,
        pool: Pool,
        dispatch: Dispatch,
        configured: Configured,
        metrics: Metrics,
        *,
        worker: WorkerId,
        lanes: tuple[Lane, ...] | None,
        lease: timedelta,
        running: Running,
        suspects: Suspects,
        handlers: Handlers = NO_HANDLERS,
    ) -> None:
        self._pool = pool
        self._dispatch = dispatch
        self._configured = configured
        self._metrics = metrics
        self._worker = worker
        self._lanes = lanes
        self._lease = lease
        self._running = running
        self._suspects = suspects
        self._handlers = handlers
        self._store_claims = StoreClaims(pool, worker, handlers.abilities)

    def lanes(self) -> Mapping[Lane, int]:
        """Return the lanes this worker serves, with their weights in the present configuration."""
        weights = self._configured.now.configuration.lane_weights()
        served = weights if self._lanes is None else {lane: weights.get(lane, 1) for lane in self._lanes}
        return {**served, **{own: served[lane] for own, lane in self._handlers.lanes(served)}}

    def shortest_lease(self) -> timedelta:
        """Return the shortest lease of a lane: heartbeats go by it."""
        return min([self._lease, *self._leases().values()])

    async def follow(self, version: int) -> None:
        """Work under this version of the configuration, or a newer one, from now on."""
        try:
            await self._configured.follow(version)
        except (InvalidConfiguration, *UNREACHABLE) as error:
            # The jobs are claimed: they run under the version that is here; the next claim asks again.
            _logger.warning("configuration %d cannot be followed: %s", version, error)

    async def fill(self, free: int) -> Claim:
        """Start as many jobs as there are free slots, if so many are due.

        Raises:
            DispatchUnavailable: nothing was claimed, or what is left over could not be told to the queue.
            UNREACHABLE: the ids that were taken come back in a moment, or when their leases end.

        """
        configured = self._configured.now
        claim = await self._dispatch.claim(
            free,
            self.lanes(),
            self._lease,
            configured.breaker.probe_lease,
            leases=self._leases(),
            terms=configured.terms,
        )
        if claim.foreign:
            self._metrics.foreign_dropped(claim.foreign)
            _logger.warning("%d members of queues were no job ids and were taken out", claim.foreign)
        await self._start(claim)
        return claim

    async def wait_for_work(self, claim: Claim) -> bool:
        """Wait until there may be something after a claim that found nothing."""
        wait = min(POLL, claim.next_due) if claim.next_due is not None else POLL
        return await self._dispatch.wait_for_jobs(tuple(self.lanes()), max(wait, timedelta(milliseconds=5)))

    async def fill_from_store(self, free: int) -> bool:
        """Start jobs as `fill` does, but without Redis; false when none was found.

        Raises:
            UNREACHABLE: none was claimed.

        """
        found = await self._store_claims.claim(
            free, self.lanes(), self._lease_of, self._take, self._configured.now.terms
        )
        await self._start_claimed(found)
        return bool(found.jobs)

    async def rest(self) -> bool:
        """Wait until it is time to claim from the store again."""
        return await self._store_claims.rest()

    def _leases(self) -> Mapping[Lane, timedelta]:
        leases = self._configured.now.configuration.lane_leases()
        return {**leases, **{own: leases[lane] for own, lane in self._handlers.lanes(leases)}}

    def _lease_of(self, lane: Lane) -> timedelta:
        return self._leases().get(lane, self._lease)

    async def _start(self, claim: Claim) -> None:
        leases = self._leases()
        by_lease: dict[timedelta, list[Entry]] = {}
        for entry in claim.entries:
            by_lease.setdefault(leases.get(entry.queue.lane, self._lease), []).append(entry)
        for lease, entries in by_lease.items():
            await self._start_some(entries, lease)

    async def _start_some(self, entries: Sequence[Entry], lease: timedelta) -> None:
        try:
            found = await claims.claim_jobs(
                self._pool,
                [entry.id for entry in entries],
                self._worker,
                lease,
                abilities=self._handlers.abilities,
            )
        except UNREACHABLE:
            with contextlib.suppress(DispatchUnavailable):
                await self._dispatch.finish([(entry, _MOMENT) for entry in entries])
            raise
        await self._start_claimed(found)
        claimed = {job.id for job in found.jobs}
        await self._put_right([entry for entry in entries if entry.id not in claimed])

    async def _start_claimed(self, found: Claims) -> None:
        if found.configuration is not None:
            await self.follow(found.configuration)
        for job in found.jobs:
            self._running.start(job)

    async def _put_right(self, entries: list[Entry]) -> None:
        """Correct the queue where it says something else than the rows."""
        if not entries:
            return
        self._metrics.duplicates_dropped(len(entries))
        ids = [entry.id for entry in entries]
        found = {one.id: one for one in await claims.look_up(self._pool, ids, self._handlers.abilities)}
        unknown = [one.id for one in found.values() if one.standing is Standing.UNKNOWN]
        if unknown:
            _logger.warning("%d jobs need a worker that knows more than this one", len(unknown))
            await claims.put_off(self._pool, unknown, _UNKNOWN_PAUSE)
        suspects = [one.id for one in found.values() if one.standing is Standing.SUSPECT]
        taken = {job_id for job_id in suspects if self._take(job_id)}
        await self._dispatch.finish(
            [(entry, _STARTING if entry.id in taken else _due_in(found.get(entry.id))) for entry in entries],
            costs=dict.fromkeys(entries, ZERO),
        )

    def _take(self, job_id: JobId) -> bool:
        return self._suspects.take(job_id, self._suspect_ended)

    def _suspect_ended(self) -> None:
        self._running.slot_freed.set()
        self._running.callback_bell.set()


def _due_in(found: Unclaimed | None) -> timedelta | None:  # noqa: PLR0911 - one case for each standing
    """Until an id that was not claimed is due again; None for one whose job has ended."""
    if found is None:
        return None
    match found.standing:
        case Standing.ENDED:
            return None
        case Standing.RUNNING | Standing.EARLY | Standing.DUE:
            return found.due_in
        case Standing.UNKNOWN:
            return _UNKNOWN_PAUSE
        case Standing.OVERDUE:
            return _MOMENT
        case Standing.SUSPECT:
            return _SUSPECT_PAUSE
        case Standing.PAUSED:
            return _UNTIL_GATES_ARE_CLOSED
