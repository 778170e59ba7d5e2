"""Whatever happens to jobs in whatever order: none is lost, none ends twice, nothing is paid twice."""

import asyncio
import os
from collections.abc import Coroutine, Iterator
from datetime import timedelta
from typing import TypeVar

import job_life_promises as promises
import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from job_life import LEASE, STEPS, Fate, Moving, Worker, World
from job_life_promises import Look

from headrace_shared import ids
from headrace_shared.outcome import WaitReason
from headrace_shared.store.pool import Pool, open_pool

pytestmark = pytest.mark.conformance

T = TypeVar("T")

LIVES = int(os.environ.get("HEADRACE_TEST_LIVES", "3"))
"""How many times the machine is started from another seed. Hypothesis varies what it has found, so
that many seeds with few examples see more than few with many."""

EXAMPLES = 10
PHASES = (Phase.generate, Phase.shrink) if "HEADRACE_TEST_SHRINK" in os.environ else (Phase.generate,)
"""Making a failure small plays it some hundred times, which takes minutes: only when asked for."""

ROOM = 2_600_000
"""A little more than the most that a call can cost."""

workers = st.integers(0, 1)
depths = st.integers(1, STEPS)
choices = st.integers(0, 10)
fates = st.sampled_from([Fate.ANSWERED, Fate.ANSWERED, *Fate])
times = st.sampled_from([timedelta(seconds=1), LEASE + timedelta(seconds=1), timedelta(seconds=61)])
"""Some of it, one lease, and longer than anything may be left behind."""


def at_work(machine: "JobLife") -> bool:
    return any(worker.moving for worker in machine.world.workers)


class JobLife(RuleBasedStateMachine):
    """Everything that producers, workers, servers and time can do to jobs."""

    runner: asyncio.Runner
    pool: Pool
    redis_url: str
    patch: pytest.MonkeyPatch

    def __init__(self) -> None:
        super().__init__()
        self._broken = self._checked = False
        self._opening = World.opened(self.pool, self.redis_url)
        self.world = self.run(self._opening.__aenter__())
        self.patch.setattr(ids, "time", self.world.clock)
        self._before = self.run(Look.at(self.world))

    def run(self, work: Coroutine[object, object, T]) -> T:
        self._broken = True
        result = self.runner.run(work)
        self._broken = False
        return result

    @initialize(count=st.integers(2, 4), room=st.integers(2, 6), steps=depths)
    def begin(self, count: int, room: int, steps: int) -> None:
        self.run(self.world.raise_limits(room * ROOM))
        self.run(self.world.enqueue(count, 3, delay=timedelta(0), hook=True, push=True))
        self.claim(0, 2, steps, Fate.ANSWERED, dies=False)

    @rule(
        count=st.integers(1, 3),
        max_attempts=st.integers(1, 3),
        seconds=st.sampled_from([0, 0, 5]),
        hook=st.booleans(),
        push=st.booleans(),
    )
    def enqueue(self, count: int, max_attempts: int, seconds: int, *, hook: bool, push: bool) -> None:
        delay = timedelta(seconds=seconds)
        self.run(self.world.enqueue(count, max_attempts, delay=delay, hook=hook, push=push))

    @rule(
        worker=workers,
        slots=st.integers(1, 3),
        steps=depths,
        fate=fates,
        dies=st.sampled_from([False] * 7 + [True]),
    )
    def claim(self, worker: int, slots: int, steps: int, fate: Fate, *, dies: bool) -> None:
        """Claim, and take what was claimed some steps further; or die with the ids in hand."""
        claiming = self.world.workers[worker]
        self.run(claiming.claim(slots, dies=dies))
        self.run(self._check())
        for moving in claiming.moving[-slots:]:
            self.run(self._take(claiming, moving, steps, fate))

    @precondition(at_work)
    @rule(worker=workers, which=choices, steps=depths, fate=fates)
    def go_on(self, worker: int, which: int, steps: int, fate: Fate) -> None:
        """One run goes some steps further, and is then left where it is."""
        self.run(self._go_on(self.world.workers[worker], which, steps, fate))

    @precondition(at_work)
    @rule(worker=workers, which=choices, fate=fates)
    def end(self, worker: int, which: int, fate: Fate) -> None:
        """One run goes on until it is ended, or put back."""
        self.run(self._go_on(self.world.workers[worker], which, STEPS, fate))

    @precondition(at_work)
    @rule(worker=workers, which=choices, fate=fates)
    def end_and_die(self, worker: int, which: int, fate: Fate) -> None:
        """A worker is killed after the commit of an ending, before Redis hears of it."""
        self.run(self._go_on(self.world.workers[worker], which, STEPS, fate, dies=True))

    @precondition(at_work)
    @rule(beats=st.lists(workers, max_size=1), worker=workers, steps=depths, fate=fates)
    def lose_leases(self, beats: list[int], worker: int, steps: int, fate: Fate) -> None:
        """A lease goes by, renewed by those who were not frozen; then a worker claims."""
        for _ in range(2):
            for beating in beats:
                self.run(self.world.workers[beating].beat())
            self.run(self.world.clock.advance(LEASE * 0.6))
        self.run(self.world.reap())
        self.claim(worker, 2, steps, fate, dies=False)

    @rule(number=choices, at_work=st.booleans())
    def cancel(self, number: int, *, at_work: bool) -> None:
        self.run(self.world.cancel(number, at_work=at_work))

    @rule(worker=workers, happens=st.sampled_from(["beat", "beat", "crash", "shut down"]))
    def meet(self, worker: int, happens: str) -> None:
        """A worker hears what is to be known, dies, or gives back everything that it runs."""
        met = self.world.workers[worker]
        match happens:
            case "beat":
                self.run(met.beat())
            case "crash":
                met.start()
            case _:
                self._shut_down(met)

    def _shut_down(self, worker: Worker) -> None:
        for moving in list(worker.moving):
            worker.interrupt(moving.run.job.id, WaitReason.SHUTDOWN)
            self.run(self._take(worker, moving, STEPS, Fate.ANSWERED))

    @rule(duration=times)
    def wait(self, duration: timedelta) -> None:
        self.run(self.world.clock.advance(duration))

    @rule(chore=st.sampled_from(["reap", "reap", "feed", "rebuild"]))
    def do(self, chore: str) -> None:
        match chore:
            case "reap":
                self.run(self.world.reap())
            case "feed":
                self.run(self.world.feed())
            case _:
                self.run(self.world.rebuild())

    @rule(loss=st.sampled_from(["wipe", "copy", "copy", "roll back"]), number=choices)
    def lose(self, loss: str, number: int) -> None:
        """Redis forgets, or comes back as another one with what it knew some time ago."""
        match loss:
            case "wipe":
                self.run(self.world.wipe())
            case "copy":
                self.run(self.world.copy())
            case _:
                self.run(self.world.roll_back(number))

    @rule(room=st.integers(1, 2))
    def raise_limits(self, room: int) -> None:
        self.run(self.world.raise_limits(room * ROOM))

    @invariant()
    def promises_hold(self) -> None:
        if not self._checked:
            self.run(self._check())
        self._checked = False

    def teardown(self) -> None:
        try:
            if not self._broken:
                self.run(self._drain())
        finally:
            self.runner.run(self._opening.__aexit__(None, None, None))

    async def _go_on(self, worker: Worker, which: int, steps: int, fate: Fate, *, dies: bool = False) -> None:
        if worker.moving:
            await self._take(worker, worker.moving[which % len(worker.moving)], steps, fate, dies=dies)

    async def _take(
        self, worker: Worker, moving: Moving, steps: int, fate: Fate, *, dies: bool = False
    ) -> None:
        """Take a run some steps further: nobody else does anything meanwhile."""
        job = moving.run.job
        for _ in range(steps):
            if moving in worker.moving:
                await worker.step(moving, fate, dies=dies)
        before = self._before
        await self._check()
        promises.same_holder(before, self._before, job.id, job.run)
        self._checked = True

    async def _check(self) -> None:
        after = await Look.at(self.world)
        await promises.everything(self.world, self._before, after)
        self._before = after

    async def _drain(self) -> None:
        """Faults have ended: one worker is enough to bring every job to its end."""
        world = self.world
        for worker in world.workers:
            worker.start()
        for _ in range(40):
            await world.clock.advance(timedelta(minutes=2))
            await world.reap()
            await world.feed()
            await world.workers[0].claim(100, dies=False)
            await self._check()
            for moving in list(world.workers[0].moving):
                await self._take(world.workers[0], moving, STEPS, Fate.ANSWERED)
            if all(row["ended_at"] is not None for row in self._before.jobs.values()):
                break
        else:
            pytest.fail("a job never ended")
        await world.clock.advance(timedelta(minutes=2))
        await world.reap()
        await self._check()
        await world.rebuild()
        await promises.in_the_end(world, self._before)


@pytest.fixture
def machine(postgres_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[JobLife]]:
    pooler = "HEADRACE_POOLER" in os.environ
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        pool = runner.run(open_pool(postgres_url, pooler=pooler))

        class Machine(JobLife):
            pass

        Machine.runner, Machine.pool, Machine.redis_url, Machine.patch = runner, pool, redis_url, monkeypatch
        yield Machine
        runner.run(pool.close())


@pytest.mark.parametrize("number", range(LIVES))
def test_in_any_order_of_events_every_job_ends_once_and_is_paid_once(
    machine: type[JobLife], number: int
) -> None:
    run_state_machine_as_test(
        seed(number)(machine),
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=30,
            derandomize=True,
            phases=PHASES,
            report_multiple_bugs=False,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )
