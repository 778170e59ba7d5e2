"""Watches a run from outside: budgets, endings, who holds what, how many connections there are."""

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from uuid import UUID

import asyncpg

from headrace_producer.chaos import records
from headrace_producer.chaos.faults import Victim
from headrace_producer.chaos.members import Member
from headrace_producer.chaos.records import Ending, Holding
from headrace_producer.chaos.screen import Screen
from headrace_producer.chaos.stage import LEASE, Stage
from headrace_shared.errors import HeadraceError
from headrace_shared.store.pool import UNREACHABLE, Connection, connect

SAMPLE_SECONDS = 0.3
PROGRESS_SECONDS = 5.0
RECOVERY = LEASE + timedelta(seconds=2)
"""How long after its death a worker may keep its jobs, when everything else is well."""

_ANSWER_SECONDS = 2.0
_TEN_SECONDS = 10.0
_RECOVERY_POLL_SECONDS = 0.1
_AWAY = (HeadraceError, TimeoutError, asyncpg.PostgresError, *UNREACHABLE)


@dataclass(frozen=True, slots=True)
class Recovery:
    """How long a dead worker's jobs stayed in its hands."""

    worker: str
    jobs: int
    died: float
    """On the monotonic clock."""
    over: float
    left: int
    """Jobs that did not come back at all."""
    away: float = 0.0
    """For how many seconds of that time a server or a way to one was away."""

    @property
    def seconds(self) -> float:
        return self.over - self.died


@dataclass(slots=True)
class Seen:
    """Everything that was seen, as far as it can be judged."""

    samples: int = 0
    over_budget: list[str] = field(default_factory=list[str])
    endings: dict[UUID, Ending] = field(default_factory=dict[UUID, Ending])
    """The first that was seen of each job's."""
    changed: list[str] = field(default_factory=list[str])
    """Endings that were another one when they were seen again."""
    holders: dict[tuple[UUID, int], str] = field(default_factory=dict[tuple[UUID, int], str])
    """The worker that was seen with a job's run."""
    two_holders: list[str] = field(default_factory=list[str])
    runs: dict[tuple[UUID, int], datetime] = field(default_factory=dict[tuple[UUID, int], datetime])
    """When a run was seen first, by the store's clock."""
    recoveries: list[Recovery] = field(default_factory=list[Recovery])
    connections: dict[str, int] = field(default_factory=dict[str, int])
    """The most sockets that a worker had open."""
    dials: dict[str, int] = field(default_factory=dict[str, int])
    """The most connections that a worker made to Postgres and Redis in ten seconds."""
    standstill: tuple[float, float] = 0.0, 0.0
    """The longest time in which no job ended although there were some, and when it was over; in seconds."""
    in_redis: list[str] = field(default_factory=list[str])
    redis_searches: int = 0


class Watcher:
    """Looks again and again, until it is cancelled; servers may be away meanwhile."""

    def __init__(self, stage: Stage, screen: Screen) -> None:
        self.seen = Seen()
        self.away: list[tuple[float, float]] = []
        """When a server or a way to one was away, on the monotonic clock; noted when it is over."""
        self.progress = records.Progress()
        self._stage = stage
        self._screen = screen
        self._connection: Connection | None = None
        self._since = datetime.fromtimestamp(0).astimezone()
        self._moved = screen.seconds
        self._dials: dict[str, deque[tuple[float, int]]] = {}
        self._told: set[object] = set()
        """Jobs and runs that something was said about: it would be the same at every look."""
        self._recovering: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        told = time.monotonic()
        while True:
            began = time.monotonic()
            try:
                async with asyncio.timeout(_ANSWER_SECONDS):
                    await self._look()
            except _AWAY:
                self._give_up_connection()
            self._count_connections()
            for member in (*self._stage.workers, *self._stage.producers):
                await member.revive()
            if began - told >= PROGRESS_SECONDS:
                told = began
                self._screen.event(self.progress.in_words)
                await self._search_redis()
            await asyncio.sleep(max(0.05, began + SAMPLE_SECONDS - time.monotonic()))

    async def kill(self, member: Member) -> None:
        """Kill a worker, and watch until others have what it held."""
        pid = member.pid
        await member.kill()
        died = time.monotonic()
        task = asyncio.create_task(self._watch_recovery(member.name, pid, died))
        self._recovering.add(task)
        task.add_done_callback(self._recovering.discard)

    def forget_progress(self) -> None:
        """Let nobody believe that all has ended until it is looked at again."""
        self.progress = records.Progress(jobs=1)

    async def recovered(self) -> None:
        """Wait until all jobs of killed workers are back, or were given up."""
        if self._recovering:
            await asyncio.wait(self._recovering)
        self.seen.recoveries = [
            replace(one, away=self._away_between(one.died, one.over)) for one in self.seen.recoveries
        ]

    async def _look(self) -> None:
        connection = await self._connected()
        for name, used, limit in await records.budgets(connection):
            self.seen.samples += 1
            if used > limit:
                self.seen.over_budget.append(
                    f"{name}: {used} of {limit} nano-USD at {self._screen.seconds:.1f} s"
                )
        for holding in await records.holdings(connection, self._stage.tenants):
            self._note_holding(holding)
        for ending in await records.endings(connection, self._stage.tenants, self._since):
            self._note_ending(ending)
            self._since = max(self._since, ending.ended_at - timedelta(seconds=2))
        before = self.progress.succeeded + self.progress.failed
        self.progress = await records.progress(connection, self._stage.tenants)
        self._note_movement(moved=self.progress.succeeded + self.progress.failed != before)

    def _note_movement(self, *, moved: bool) -> None:
        now = self._screen.seconds
        if self.progress.jobs > self.progress.ended:
            self.seen.standstill = max(self.seen.standstill, (now - self._moved, now))
        if moved or self.progress.jobs == self.progress.ended:
            self._moved = now

    def _note_holding(self, holding: Holding) -> None:
        run = holding.job, holding.run
        first = self.seen.holders.setdefault(run, holding.worker)
        self.seen.runs.setdefault(run, holding.at)
        if first != holding.worker and run not in self._told:
            self._told.add(run)
            self.seen.two_holders.append(f"job {holding.job} run {holding.run}: {first} and {holding.worker}")

    def _note_ending(self, ending: Ending) -> None:
        first = self.seen.endings.setdefault(ending.job, ending)
        if first != ending and ending.job not in self._told:
            self._told.add(ending.job)
            self.seen.changed.append(f"job {ending.job}: {first.in_words}, later {ending.in_words}")

    async def _watch_recovery(self, name: str, pid: int, died: float) -> None:
        held: list[Holding] = []
        left = 0
        while True:
            try:
                async with asyncio.timeout(_ANSWER_SECONDS):
                    connection = await connect(self._stage.servers.postgres_url)
                    try:
                        held = held or await records.held_by(connection, self._stage.tenants, pid)
                        left = await records.still_held(connection, held)
                    finally:
                        connection.terminate()
            except _AWAY:
                left = 1
            now = time.monotonic()
            away = self._away_between(died, now)
            if left == 0 or now - died > 3 * RECOVERY.total_seconds() + away + _GIVEN_UP_SECONDS:
                break
            await asyncio.sleep(_RECOVERY_POLL_SECONDS)
        jobs = len(held)
        self.seen.recoveries.append(Recovery(name, jobs, died, now, left))
        self._screen.event(f"{name}: its {jobs} jobs are back after {now - died:.1f} s")

    def _away_between(self, began: float, ended: float) -> float:
        """Sum up for how long somebody was away in a span of time."""
        spans = sorted((max(began, start), min(ended, end)) for start, end in self.away)
        total, covered = 0.0, began
        for start, end in spans:
            total += max(0.0, end - max(start, covered))
            covered = max(covered, end)
        return total

    def _count_connections(self) -> None:
        for member in self._stage.workers:
            if member.runs:
                most = max(self.seen.connections.get(member.name, 0), _sockets(member.pid))
                self.seen.connections[member.name] = most
            self._count_dials(member)

    def _count_dials(self, member: Member) -> None:
        made = sum(way.accepted for where, way in member.ways.items() if where.to is not Victim.PROVIDER)
        looks = self._dials.setdefault(member.name, deque())
        looks.append((time.monotonic(), made))
        while looks[0][0] < time.monotonic() - _TEN_SECONDS:
            looks.popleft()
        self.seen.dials[member.name] = max(self.seen.dials.get(member.name, 0), made - looks[0][1])

    async def _search_redis(self) -> None:
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                found = await self._stage.canaries.in_redis(self._stage.redis)
        except _AWAY:
            return
        self.seen.redis_searches += 1
        self.seen.in_redis += found

    async def _connected(self) -> Connection:
        if self._connection is None:
            self._connection = await connect(self._stage.servers.postgres_url)
        return self._connection

    def _give_up_connection(self) -> None:
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None


_GIVEN_UP_SECONDS = 30.0


def _sockets(pid: int) -> int:
    """Count the sockets that a process has open; 0 where the system does not say."""
    folder = Path(f"/proc/{pid}/fd")
    try:
        return sum(str(entry.readlink()).startswith("socket:") for entry in folder.iterdir())
    except OSError:
        return 0
