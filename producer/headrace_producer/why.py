"""Why a job is where it is: what it waits for, with numbers and the time that takes.

It looks, and changes nothing: in Postgres inside one read-only transaction, in Redis by scripts that
only read. Without Redis it says what the store knows, and that the rest is not known.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import assert_never

from headrace_producer.in_force import Snapshot, read_snapshot
from headrace_producer.reasons import (
    BreakerIsOpen,
    BudgetIsSpent,
    CapIsReached,
    HasEnded,
    IsNext,
    IsPaused,
    IsRunning,
    LimitIsReached,
    NobodyServes,
    NotDue,
    RanOutOfTime,
    Reason,
    RunsAlone,
    WaitsForASlot,
    WaitsItsTurn,
    words_of,
)
from headrace_shared.budgets import Budgets, BudgetView
from headrace_shared.dispatch import breakers, limits
from headrace_shared.dispatch.connection import Redis
from headrace_shared.dispatch.dispatch import Dispatch, dimensions_of
from headrace_shared.dispatch.limits import Measure, View
from headrace_shared.errors import DispatchUnavailable, InvalidInput, JobNotFound
from headrace_shared.handlers import handler_of, public_lane
from headrace_shared.ids import JobId, WorkerId
from headrace_shared.job import Job, JobState
from headrace_shared.money import ZERO, NanoUSD
from headrace_shared.outcome import WaitReason
from headrace_shared.pauses import gate_of_scope, paused_target
from headrace_shared.request import Endpoint, prepare
from headrace_shared.scopes import scopes_of
from headrace_shared.store import jobs, money, pauses, waits
from headrace_shared.store.money import BudgetPolicy
from headrace_shared.store.pool import Connection, Pool
from headrace_shared.store.waits import RunOf

_SUSPECT = 2
"""A job that lost so many workers runs in a process of its own."""

_CLAIMED_AHEAD = timedelta(seconds=0.4)
"""How far ahead of the moments of their calls jobs are claimed (limits.lua): a shorter wait keeps nobody
back."""


@dataclass(frozen=True, slots=True)
class Why:
    """How a job stands, and what is in its way."""

    job_id: JobId
    state: JobState
    reasons: tuple[Reason, ...]
    """The first is the one to look at; while any of them holds the job does not begin."""
    unknown: str | None
    """What could not be looked at; None when all was."""

    @property
    def expected(self) -> timedelta | None:
        """Until the job may go on; None where one of the reasons has no end that is known."""
        ends = [_left(reason) for reason in self.reasons]
        known = [end for end in ends if end is not None]
        return max(known) if known and len(known) == len(ends) else None

    @property
    def sentence(self) -> str:
        said = "; besides it ".join(words_of(reason) for reason in self.reasons)
        return f"Job {self.job_id} {said}." + (f" {self.unknown}" if self.unknown else "")

    def __str__(self) -> str:
        return self.sentence


def _left(reason: Reason) -> timedelta | None:
    match reason:
        case (
            NotDue()
            | IsPaused()
            | BreakerIsOpen()
            | BudgetIsSpent()
            | WaitsItsTurn()
            | LimitIsReached()
            | CapIsReached()
        ):
            return reason.left
        case RanOutOfTime() | IsNext():
            return timedelta(0)
        case HasEnded() | IsRunning() | NobodyServes() | RunsAlone() | WaitsForASlot():
            return None
        case _:
            assert_never(reason)


async def explain(pool: Pool, redis: Redis, job_id: JobId) -> Why:
    """Say why a job is where it is.

    Raises:
        JobNotFound: there is no such job.

    """
    async with (
        pool.acquire() as connection,
        connection.transaction(isolation="repeatable_read", readonly=True),
    ):
        job = await jobs.get_job(connection, job_id)
        run = await waits.run_of(connection, job_id)
        if job is None or run is None:
            raise JobNotFound(job_id=job_id)
        if job.state.ended:
            return Why(job_id, job.state, (_ended(job),), None)
        if job.state is JobState.RUNNING:
            return Why(job_id, job.state, (_running(job, run),), None)
        return await _Look(connection, redis, job, run).look()


def _ended(job: Job) -> HasEnded:
    return HasEnded(job.state, job.ended_at or job.created_at, job.error_class, job.error)


def _running(job: Job, run: RunOf) -> IsRunning:
    return IsRunning(
        worker=run.worker or WorkerId("?"),
        run=job.run,
        first_started_at=job.started_at,
        lease_left=(run.lease_until or run.now) - run.now,
        call=run.call,
        call_for=run.now - run.call.since if run.call else timedelta(0),
        cancelling=run.cancel_requested,
    )


class _Look:
    """One look at what is in a queued job's way."""

    def __init__(self, connection: Connection, redis: Redis, job: Job, run: RunOf) -> None:
        self._connection = connection
        self._redis = redis
        self._job = job
        self._now = run.now
        self._queue = job.queue
        self._unknown: str | None = None

    async def look(self) -> Why:
        """Return what is in its way, and where nothing is, whose turn it is."""
        snapshot = await read_snapshot(self._connection)
        found = [
            *self._time(),
            *await self._pauses(),
            *await self._dispatch(snapshot),
            *await self._budgets(snapshot),
            *await self._workers(),
        ]
        # A limit and a cap let jobs through all the time: those before it go first.
        if all(isinstance(one, LimitIsReached | CapIsReached) for one in found):
            turn = await self._turn()
            found += [turn] if not found or isinstance(turn, WaitsItsTurn) else []
        return Why(self._job.id, self._job.state, tuple(found), self._unknown)

    def _time(self) -> list[Reason]:
        job = self._job
        overdue = min((moment for moment in (job.start_by, job.end_by) if moment), default=None)
        if overdue is not None and overdue <= self._now:
            return [RanOutOfTime(overdue)]
        if job.run_at > self._now:
            reason = _read_wait(job.waiting_for)
            left = job.run_at - self._now
            return [NotDue(job.run_at, left, reason, job.attempts, job.max_attempts, job.error_class)]
        return []

    async def _pauses(self) -> list[Reason]:
        mine = set(dimensions_of(self._queue))
        return [
            IsPaused(pause.scope, pause.since, pause.until, pause.left)
            for pause in await pauses.in_force(self._connection)
            if (gate := gate_of_scope(pause.scope)) is not None and gate.dimension in mine
        ]

    async def _dispatch(self, snapshot: Snapshot) -> list[Reason]:
        """What only Redis knows. Gates are not asked: pauses, breakers and budgets themselves say more."""
        try:
            return [
                *await self._breakers(snapshot),
                *await self._limits(snapshot),
                *await self._caps(),
            ]
        except DispatchUnavailable:
            self._unknown = "Redis cannot be reached: limits and breakers are not known."
            return []

    async def _breakers(self, snapshot: Snapshot) -> list[Reason]:
        """Its targets' breakers, if all of them are open; a handler has none of its own."""
        if handler_of(self._job.endpoint) is not None:
            return []
        try:
            targets = snapshot.configuration.resolve_route(self._job.route).targets
        except InvalidInput:
            return []
        held = {paused_target(pause): pause for pause in await pauses.in_force(self._connection)}
        window = snapshot.configuration.breaker.window
        found: list[BreakerIsOpen] = []
        for target in targets:
            view = await breakers.view(self._redis, target, window)
            if not view.is_open:
                return []
            hand = held.get(target)
            found.append(
                BreakerIsOpen(
                    target=target,
                    targets=len(targets),
                    failed=view.failed,
                    calls=view.failed + view.answered,
                    left=view.reopens_in if hand is None else hand.left,
                    by_hand=hand is not None,
                    probing=view.probing,
                )
            )
        return [min(found, key=lambda one: timedelta.max if one.left is None else one.left)]

    async def _limits(self, snapshot: Snapshot) -> list[Reason]:
        """The limits of the target that has room first, if none of its targets has any, as claims see it."""
        try:
            targets = snapshot.configuration.resolve_route(self._job.route).targets
        except InvalidInput:
            return []
        found: list[View] = []
        for target in targets:
            views = await limits.view(self._redis, [limits.limiter_of(target), target.provider])
            full = [view for view in views if view.room is not None and view.room < 1]
            if not full:
                return []
            found.append(max(full, key=lambda view: view.asked_again))
        first = min(found, key=lambda view: view.asked_again)
        return _of_limiter(first, len(targets), await self._next_ends())

    async def _caps(self) -> list[Reason]:
        """Return the caps under which it would run and that are full: its tenant's, and its API key's."""
        job = self._job
        scopes = [f"tenant:{job.tenant}", *([f"key:{job.api_key}"] if job.api_key else [])]
        found: list[Reason] = []
        for scope in scopes:
            cap = await Dispatch(self._redis).cap(scope)
            if cap.most is not None and cap.is_full:
                found.append(CapIsReached(scope, cap.running, cap.most, await self._next_ends()))
        return found

    async def _next_ends(self) -> timedelta | None:
        """Return how long it takes until a job of its queue ends, if it goes on as of late."""
        pace = await waits.pace_of(self._connection, self._job)
        return None if pace is None else timedelta(seconds=1 / pace)

    async def _budgets(self, snapshot: Snapshot) -> list[Reason]:
        """Return the budgets that have no room for its next call."""
        scopes = scopes_of(self._job, self._job.route)
        views = [
            view
            for view in await self._views()
            if view.state.scope in scopes and view.state.policy is not BudgetPolicy.SOFT
        ]
        if not views:
            return []
        needs = await self._needs(snapshot)
        least = 1 if needs is None else needs
        short = [view for view in views if view.remaining < least]
        return [
            BudgetIsSpent(
                scope=view.state.scope,
                kind=view.state.kind,
                limit=view.state.limit,
                settled=view.state.settled,
                suspense=view.state.suspense,
                held=view.held,
                needs=needs,
                left=await waits.window_ends_in(self._connection, view.state.kind),
            )
            for view in short
        ]

    async def _views(self) -> list[BudgetView]:
        try:
            return await Budgets(self._connection, self._redis).view()
        except DispatchUnavailable:
            held = await money.held(self._connection)
            states = await money.budget_state(self._connection)
            return [BudgetView(state, held.get((state.scope, state.window), ZERO)) for state in states]

    async def _needs(self, snapshot: Snapshot) -> NanoUSD | None:
        """Return the most that its next call can cost; a handler asks for that when it runs."""
        body = await waits.body_of(self._connection, self._job.id)
        if body is None or not isinstance(self._job.endpoint, Endpoint):
            return None
        try:
            target = snapshot.configuration.resolve_route(self._job.route).targets[0]
            price = snapshot.prices.price(target)
            most = snapshot.configuration.defaults.max_output_tokens
            request = prepare(body, self._job.endpoint, target.model, most, price.vocabulary)
            return price.worst_case(request.input_bound, request.output_bound, request.hosted)
        except InvalidInput:
            return None

    async def _workers(self) -> list[Reason]:
        job = self._job
        capacity = await waits.capacity_for(self._connection, job.lane)
        found: list[Reason] = []
        if not capacity.serving:
            handler = handler_of(job.endpoint)
            found.append(NobodyServes(public_lane(job.lane), handler, capacity.workers))
        if job.crashes >= _SUSPECT:
            found.append(RunsAlone(job.crashes))
        return found

    async def _turn(self) -> Reason:
        before = await waits.place_of(self._connection, self._job)
        capacity = await waits.capacity_for(self._connection, self._job.lane)
        if before:
            pace = await waits.pace_of(self._connection, self._job)
            left = None if pace is None else timedelta(seconds=(before + 1) / pace)
            return WaitsItsTurn(before, capacity.running, capacity.slots, left)
        if capacity.running >= capacity.slots:
            return WaitsForASlot(capacity.running, capacity.slots)
        return IsNext(capacity.running, capacity.slots)


def _of_limiter(view: View, targets: int, ends: timedelta | None) -> list[Reason]:
    """Say which of its limits have no room; where that is only what was claimed already, the nearest one.

    Args:
        view: of the limiter.
        targets: of the route.
        ends: when a call that is under way ends, as far as is known.

    """
    name = limits.display_name(view.standing.limiter)

    def reached(one: Measure, left: timedelta | None) -> LimitIsReached:
        return LimitIsReached(name, targets, one.what, one.limit, one.in_force, one.used, left)

    cooling = view.standing.cooling
    found: list[Reason] = []
    if cooling:
        found.append(LimitIsReached(name, targets, "cooling", None, None, 0, cooling))
    full = [one for one in view.measures if one.what == "concurrent" and one.used >= (one.limit or 0)]
    found += [reached(one, ends) for one in full]
    slowest = max(view.measures, key=lambda one: one.wait, default=None)
    if slowest is not None and slowest.wait > max(cooling, _CLAIMED_AHEAD):
        found.append(reached(slowest, slowest.wait))
    if not found and slowest is not None:
        found.append(reached(slowest, view.asked_again))
    return found


def _read_wait(text: str | None) -> WaitReason | None:
    """Read what a row says; what a newer worker wrote is taken for no reason."""
    try:
        return None if text is None else WaitReason(text)
    except ValueError:
        return None
