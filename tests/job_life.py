"""The world in which jobs live their lives: real servers, and processes that can stop anywhere.

A worker here is not a task that runs by itself: whoever plays it takes each of its runs through
the real steps of a run, as far as it likes, and then freezes it, kills it, or lets other things
happen in between. The provider keeps books of its own.
"""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum
from typing import cast

from redis.asyncio.connection import AbstractConnection

from headrace_shared.budgets import Budgets
from headrace_shared.dispatch.connection import Redis
from headrace_shared.dispatch.dispatch import Dispatch, Entry
from headrace_shared.ids import CallNumber, JobId, Lane, WorkerId
from headrace_shared.ids import Run as RunNumber
from headrace_shared.job import ClaimedJob, JobState
from headrace_shared.money import NanoUSD
from headrace_shared.outcome import Cancelled, ErrorClass, Failed, Failure, Outcome, Snoozed, WaitReason
from headrace_shared.store import claims
from headrace_shared.store import jobs as stored_jobs
from headrace_shared.store.money import BudgetPolicy, WindowKind
from headrace_shared.store.pool import Pool
from headrace_shared.testing.clock import Clock, script
from headrace_shared.testing.jobs import LANE, TENANT, Jobs
from headrace_shared.testing.spending import flush
from headrace_shared.usage import Usage
from headrace_workers.breaker import Breakers
from headrace_workers.choosing import Choosing
from headrace_workers.configured import Configured
from headrace_workers.execution import Again, Run
from headrace_workers.feeder import Feeder
from headrace_workers.finisher import Finisher
from headrace_workers.heartbeat import Heartbeat
from headrace_workers.leases import Leases
from headrace_workers.limiting import Limiter
from headrace_workers.reaper import Reaper
from headrace_workers.replies import Answered, Refused, Reply, Unknown
from headrace_workers.retry_budget import RetryBudget
from headrace_workers.steps.downgrade import Downgrade
from headrace_workers.steps.guard import Guard
from headrace_workers.steps.hold import Hold
from headrace_workers.steps.journal import Journal
from headrace_workers.steps.route import Route
from headrace_workers.steps.settle import Settle
from headrace_workers.telemetry import Metrics

CallKey = tuple[JobId, RunNumber, CallNumber]

LEASE = timedelta(seconds=10)
LANES = {LANE: 1}
SCOPES = ("global", f"tenant:{TENANT}")
NOWHERE = "unix:///nowhere/valkey.sock"
STEPS = 8
"""More than a call has: guard, route, hold, journal, sent, answered, settled."""

_USAGE = Usage(prompt_tokens=4, cached_tokens=0, completion_tokens=2, reasoning_tokens=0)
_LATENCY = timedelta(milliseconds=10)
_EMPTY = """
DELETE FROM headrace.jobs; DELETE FROM headrace.attempts; DELETE FROM headrace.calls;
DELETE FROM headrace.spend; DELETE FROM headrace.budgets; DELETE FROM headrace.deliveries;
DELETE FROM headrace.workers; UPDATE headrace.clock SET shift = '0';
"""
_SAVE = """
local saved = {}
for _, key in ipairs(redis.call('KEYS', '*')) do
    if key ~= 'headrace:clock' then
        saved[#saved + 1] = key
        saved[#saved + 1] = redis.call('DUMP', key)
    end
end
return saved
"""
_RESTORE = """
for i = 1, #ARGV, 2 do redis.call('RESTORE', ARGV[i], 0, ARGV[i + 1]) end
return 1
"""


class Fate(Enum):
    """What the provider does with a call, and what its caller sees of that."""

    ANSWERED = "answered"
    FILTERED = "filtered"
    REFUSED = "refused"
    FAILED = "failed"
    TIMED_OUT = "timed out"
    """Without having been billed, which its caller cannot know."""
    CUT_OFF = "cut off"
    """It was billed, and the answer did not arrive."""

    @property
    def is_billed(self) -> bool:
        return self in (Fate.ANSWERED, Fate.FILTERED, Fate.CUT_OFF)


class Server(Redis):
    """A connection to a server that can come back as another one, with an older memory."""

    def __init__(self, url: str, lives: list[int]) -> None:
        self._lives = lives
        super().__init__(url)

    async def _connected(self, connection: AbstractConnection) -> None:
        await super()._connected(connection)
        self.run_id += f" life {len(self._lives)}"

    def reborn(self) -> None:
        self.run_id = f"{self.run_id.split()[0]} life {len(self._lives)}" if self.run_id else ""


@dataclass
class Moving:
    """A run on its way; `done` of its steps are behind it."""

    run: Run
    done: int = 0
    interruption: WaitReason | ErrorClass | None = None
    fate: Fate | None = None


@dataclass(frozen=True, slots=True)
class Books:
    """What the provider was asked, and what it will bill for each call."""

    asked: dict[CallKey, NanoUSD] = field(default_factory=dict[CallKey, NanoUSD])

    def ask(self, run: Run, fate: Fate) -> None:
        if run.price is None:
            raise AssertionError(run)
        cost = run.price.cost(_USAGE) if fate.is_billed else NanoUSD(0)
        self.asked[run.job.id, run.job.run, run.call] = cost


class Worker:
    """A worker process: what it holds in memory is gone when it is killed."""

    def __init__(self, world: "World", worker_id: WorkerId) -> None:
        self.id = worker_id
        self._world = world
        self._lives = 0
        self.start()

    def start(self) -> None:
        """Begin as a process that knows nothing."""
        world, self._lives = self._world, self._lives + 1
        me = WorkerId(f"{self.id}-{self._lives}")
        self.budgets = Budgets(world.pool, world.redis)
        self.running: dict[JobId, ClaimedJob] = {}
        self.moving: list[Moving] = []
        self.worker_id = me
        self._choosing = Choosing(world.configured, world.breakers)
        self._steps = (
            Guard(),
            Route(world.configured, self._choosing),
            Hold(self.budgets, world.dispatch, Downgrade(world.configured, self._choosing)),
            Journal(world.pool, self.budgets),
        )
        self._heartbeat = Heartbeat(
            world.pool,
            world.dispatch,
            me,
            shortest_lease=lambda: LEASE,
            running=self.running,
            interrupt=self.interrupt,
            introduce=lambda: ("host", 8, ("default",)),
            follow=world.configured.follow,
            leases=Leases(),
        )

    async def claim(self, slots: int, *, dies: bool) -> None:
        """Take ids out of the dispatch, and the rows that they name."""
        lanes: dict[Lane, int] = dict(LANES)
        claim = await self._world.dispatch.claim(slots, lanes, LEASE, LEASE)
        if dies:
            self.start()
            return
        queues = {entry.id: entry.queue for entry in claim.entries}
        claimed = (await claims.claim_jobs(self._world.pool, list(queues), self.worker_id, LEASE)).jobs
        others = await claims.look_up(self._world.pool, list(queues.keys() - {job.id for job in claimed}))
        # A suspect gets a process of its own, which is a part of this worker here.
        suspects = [one.id for one in others if one.standing is claims.Standing.SUSPECT]
        alone = await claims.claim_jobs(self._world.pool, suspects, self.worker_id, LEASE, alone=True)
        for job in [*claimed, *alone.jobs]:
            self.running[job.id] = job
            self.moving.append(Moving(Run.of(job)))
        ended = [one.id for one in others if one.standing is claims.Standing.ENDED]
        await self._world.dispatch.finish([(Entry(queues[job_id], job_id), None) for job_id in ended])

    def interrupt(self, job_id: JobId, reason: WaitReason | ErrorClass) -> None:
        for moving in self.moving:
            if moving.run.job.id == job_id and moving.interruption is None:
                moving.interruption = reason

    async def beat(self) -> None:
        await self._heartbeat.beat()

    async def step(self, moving: Moving, fate: Fate, *, dies: bool = False) -> None:
        """Take a run one step further."""
        run = moving.run
        if run.outcome is None and moving.interruption is not None:
            run = run.ended(_interrupted(moving.interruption))
        if run.outcome is not None or run.reply is not None:
            await self._end(moving, run, dies=dies)
        elif moving.done < len(self._steps):
            moving.run = await self._steps[moving.done](run)
            moving.done += 1
        elif not run.sent:
            moving.fate = fate
            moving.run = run._replace(sent=True)
            self._world.books.ask(run, fate)
        elif moving.fate is not None:
            moving.run = run._replace(reply=_reply(moving.fate))

    async def _end(self, moving: Moving, run: Run, *, dies: bool) -> None:
        finisher = self._finisher(dies=dies)
        configured, retries = self._world.configured, RetryBudget(self._world.redis, self._world.configured)
        settle = Settle(
            finisher,
            configured,
            self._choosing,
            retries,
            Metrics(enabled=False),
            breakers=self._world.breakers,
            limiter=self._world.limiter,
        )
        ended = await settle(run)
        await finisher.drain()
        if dies:
            self.start()
        elif isinstance(ended, Again):
            moving.run, moving.done, moving.fate = ended.run, 0, None
        else:
            self.moving.remove(moving)
            if self.running.get(run.job.id) is run.job:
                del self.running[run.job.id]

    def _finisher(self, *, dies: bool) -> Finisher:
        """One that dies after its commit is one whose Redis hears nothing of it."""
        pool, dispatch, budgets = self._world.pool, self._world.dispatch, self.budgets
        if dies:
            away = Redis(NOWHERE)
            dispatch, budgets = Dispatch(away), Budgets(pool, away)
        return Finisher(pool, dispatch, budgets, self.worker_id, {})


class World:
    """One database and one Redis, the workers of a fleet, and the books of its provider."""

    def __init__(self, pool: Pool, redis: Server, lives: list[int], configured: Configured) -> None:
        self.pool = pool
        self.redis = redis
        self.configured = configured
        self.clock = Clock(pool, redis)
        self.dispatch = Dispatch(redis)
        self.breakers = Breakers(self.dispatch, configured)
        self.limiter = Limiter(redis, configured, pool)
        self.books = Books()
        self.acked: list[JobId] = []
        self.limits: dict[str, int] = {}
        self._lives = lives
        self._jobs = Jobs(pool, self.dispatch)
        self._copies: list[list[bytes]] = []
        self._budgets = Budgets(pool, redis)
        self._feeder = Feeder(pool, self.dispatch, listen_url=None)
        self._reaper = Reaper(
            pool, self.dispatch, self._budgets, self.breakers, configured, lease=timedelta(0)
        )
        self.workers = [Worker(self, WorkerId(name)) for name in ("one", "other")]

    @classmethod
    @asynccontextmanager
    async def opened(cls, pool: Pool, redis_url: str) -> AsyncGenerator["World"]:
        """An empty world, in a database that only it uses."""
        lives: list[int] = []
        redis = Server(redis_url, lives)
        try:
            await pool.execute(_EMPTY)
            await redis.evaluate(script("return redis.call('FLUSHDB')"))
            yield cls(pool, redis, lives, await Configured.load(pool))
        finally:
            await redis.close()

    async def enqueue(
        self, count: int, max_attempts: int, *, delay: timedelta, hook: bool, push: bool
    ) -> None:
        self.acked += await self._jobs.add(
            count,
            max_attempts=max_attempts,
            delay=delay,
            webhook="https://example.com/hook" if hook else None,
            push=push,
        )

    async def cancel(self, number: int, *, at_work: bool) -> None:
        """Do what a client does that cancels a job: one that a worker has, or any."""
        held = [moving.run.job.id for worker in self.workers for moving in worker.moving]
        ids = held if at_work and held else self.acked
        job_id = ids[number % len(ids)]
        cancellation = await stored_jobs.cancel_job(self.pool, job_id)
        if cancellation and cancellation.changed and cancellation.state is JobState.CANCELLED:
            await self.dispatch.finish([(Entry(cancellation.queue, job_id), None)])

    async def raise_limits(self, amount: int) -> None:
        for scope in SCOPES:
            self.limits[scope] = self.limits.get(scope, 0) + amount
            limit = NanoUSD(self.limits[scope])
            await self._budgets.set(scope, WindowKind.TOTAL, limit, BudgetPolicy.WAIT)

    async def rebuild(self) -> None:
        await self._budgets.rebuild()

    async def feed(self) -> None:
        await self._feeder.turn()

    async def reap(self) -> None:
        await self._reaper.turn()

    async def wipe(self) -> None:
        await flush(self.redis)

    async def copy(self) -> None:
        saved = await self.redis.evaluate(script(_SAVE))
        self._copies.append(cast("list[bytes]", saved))

    async def roll_back(self, number: int) -> None:
        """Let Redis come back as another server that remembers less."""
        await flush(self.redis)
        if self._copies:
            await self.redis.evaluate(script(_RESTORE), (), self._copies[number % len(self._copies)])
        self._lives.append(1)
        self.redis.reborn()


def _interrupted(reason: WaitReason | ErrorClass) -> Outcome:
    if reason is ErrorClass.CANCELLED:
        return Cancelled()
    if isinstance(reason, WaitReason):
        return Snoozed(timedelta(0), reason)
    return Failed(Failure(reason, "the run was interrupted"))


def _reply(fate: Fate) -> Reply:
    match fate:
        case Fate.ANSWERED:
            return Answered(_LATENCY, 200, "req", b"{}", _USAGE, "stop")
        case Fate.FILTERED:
            failure = Failure(ErrorClass.CONTENT_FILTER, "filtered")
            return Answered(_LATENCY, 200, "req", b"{}", _USAGE, "content_filter", failure)
        case Fate.REFUSED:
            return Refused(_LATENCY, Failure(ErrorClass.BAD_REQUEST, "refused"), 400)
        case Fate.FAILED:
            return Refused(_LATENCY, Failure(ErrorClass.TRANSIENT, "failed"), 500)
        case Fate.TIMED_OUT | Fate.CUT_OFF:
            return Unknown(_LATENCY, Failure(ErrorClass.TIMEOUT, "no answer came in time"))
