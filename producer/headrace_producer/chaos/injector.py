"""Carries the faults of a schedule out, and makes everything well again."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import replace
from datetime import timedelta

from headrace_producer.chaos.faults import Act, Victim, Wire
from headrace_producer.chaos.members import Member
from headrace_producer.chaos.schedule import Event
from headrace_producer.chaos.screen import Screen
from headrace_producer.chaos.stage import CALM, LEASE, Receiver, Stage
from headrace_producer.chaos.watcher import Watcher
from headrace_shared.errors import HeadraceError
from headrace_shared.testing import server_faults
from headrace_shared.testing.behaviour import Behaviour
from headrace_shared.testing.network_faults import (
    Bandwidth,
    BlackHole,
    Drop,
    HalfOpen,
    Latency,
    NetworkFault,
    OneWay,
    Reset,
    Truncate,
)
from headrace_shared.testing.server_faults import OwnServers

_HOUR = 3600
_STORM_SECONDS = 0.4
_BEFORE_PUSH_SECONDS = 0.7
"""A producer whose way to Redis is closed has committed jobs by then that it has not pushed."""

_BEHAVIOURS = {
    Act.PROVIDER_OUTAGE: replace(CALM, outage=True),
    Act.PROVIDER_RATE_LIMIT: replace(CALM, rate_limited=0.7, retry_after=timedelta(seconds=1)),
    Act.PROVIDER_HANG: replace(CALM, hang=0.3),
    Act.PROVIDER_CUT: replace(CALM, cut=0.4),
    Act.PROVIDER_GARBAGE: replace(CALM, garbage=0.4),
    Act.PROVIDER_SLOW: replace(CALM, latency=timedelta(seconds=2)),
}


class Injector:
    """Does to a stage what a schedule says."""

    def __init__(self, stage: Stage, watcher: Watcher, screen: Screen) -> None:
        self.done = 0
        self.failed: list[str] = []
        """Faults that could not be carried out, in words."""
        self._stage = stage
        self._watcher = watcher
        self._screen = screen

    async def run(self, events: Sequence[Event]) -> None:
        """Carry all events out, each at its time; return when the last one is over."""
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for event in events:
                group.create_task(self._at_its_time(event, began))

    async def _at_its_time(self, event: Event, began: float) -> None:
        await asyncio.sleep(max(0.0, began + event.at - time.monotonic()))
        self._screen.event(f"{_whom(event)}: {event.fault.name}, {event.seconds:.1f} s ({event.fault.about})")
        start = time.monotonic()
        try:
            async with self._caused(event):
                await asyncio.sleep(max(0.0, start + event.seconds - time.monotonic()))
        except (HeadraceError, OSError, TimeoutError) as error:
            # One fault can be in the way of another: the server to be flushed is away.
            self.failed.append(f"{event.fault.name}: {error}")
            self._screen.event(f"{_whom(event)}: {event.fault.name} could not be done: {error}")
        else:
            self.done += 1
        if event.fault.is_away:
            # After its own start PostgreSQL spares all leases for one lease.
            spared = LEASE.total_seconds() if event.fault.victim is Victim.POSTGRES else 0.0
            self._watcher.away.append((start, time.monotonic() + spared))

    def _caused(self, event: Event) -> AbstractAsyncContextManager[None]:
        """Return what causes the fault when it is entered, and ends it when it is left."""
        fault = event.fault
        if isinstance(fault.act, Wire) and fault.way is not None:
            member = self._stage.members(fault.way.of)[event.victim - 1]
            return member.ways[fault.way].during(_network_fault(fault.act, event))
        if isinstance(fault.act, Wire):
            raise TypeError(fault)
        match fault.victim:
            case Victim.WORKER | Victim.PRODUCER:
                return self._of_a_process(fault.act, self._stage.members(fault.victim)[event.victim - 1])
            case Victim.POSTGRES | Victim.REDIS:
                return self._of_a_server(fault.act, event)
            case Victim.PROVIDER:
                return self._of_the_provider(_BEHAVIOURS[fault.act])
            case Victim.RECEIVER:
                return _of_a_receiver(fault.act, self._stage.receivers[event.victim - 1])

    @asynccontextmanager
    async def _of_a_process(self, act: Act, member: Member) -> AsyncGenerator[None]:
        async with member.one_at_a_time, self._of_a_free_process(act, member):
            yield

    @asynccontextmanager
    async def _of_a_free_process(self, act: Act, member: Member) -> AsyncGenerator[None]:
        match act:
            case Act.WORKER_FREEZE:
                member.freeze()
                try:
                    yield
                finally:
                    member.thaw()
                return
            case Act.WORKER_KILL:
                await self._watcher.kill(member)
            case Act.WORKER_REPLACE:
                await member.end()
            case Act.WORKER_CLOCK_AHEAD | Act.WORKER_CLOCK_BEHIND:
                await member.end()
                await member.start(skewed_by=_HOUR if act is Act.WORKER_CLOCK_AHEAD else -_HOUR)
            case Act.PRODUCER_KILL_BEFORE_PUSH:
                way = next(proxy for way, proxy in member.ways.items() if way.to is Victim.REDIS)
                async with way.during(BlackHole()):
                    await asyncio.sleep(_BEFORE_PUSH_SECONDS)
                    await member.kill()
            case _:
                await member.kill()
        yield
        await member.end()
        await member.start()

    @asynccontextmanager
    async def _of_a_server(self, act: Act, event: Event) -> AsyncGenerator[None]:
        servers = self._stage.servers
        match act:
            case Act.FLUSHALL:
                await server_faults.flush_redis(servers.redis_url)
                yield
            case Act.CLIENT_PAUSE:
                await server_faults.pause_redis(servers.redis_url, timedelta(seconds=event.seconds))
                yield
            case Act.OOM:
                async with server_faults.out_of_memory(servers.redis_url):
                    yield
            case Act.TERMINATE_BACKENDS:
                storm = asyncio.create_task(self._storm())
                try:
                    yield
                finally:
                    storm.cancel()
                    await asyncio.gather(storm, return_exceptions=True)
            case _ if servers.own is not None:
                async with self._of_an_own_server(act, servers.own, event):
                    yield
            case _:
                raise TypeError(act)

    async def _storm(self) -> None:
        while True:
            with suppress(HeadraceError, OSError):
                await server_faults.terminate_backends(self._stage.servers.postgres_url)
            await asyncio.sleep(_STORM_SECONDS)

    @asynccontextmanager
    async def _of_an_own_server(self, act: Act, own: OwnServers, event: Event) -> AsyncGenerator[None]:
        match act:
            case Act.POSTGRES_RESTART | Act.POSTGRES_OUTAGE:
                async with server_faults.postgres_down(own):
                    yield
            case Act.POSTGRES_FREEZE:
                async with server_faults.frozen_postgres(own):
                    yield
            case Act.REDIS_KILL | Act.REDIS_OUTAGE:
                async with server_faults.valkey_down(own):
                    yield
            case Act.REDIS_LOSE:
                async with server_faults.valkey_down(own, "lost"):
                    yield
            case Act.REDIS_ROLLBACK:
                folder = self._stage.directory / f"snapshot-{event.at:.0f}"
                older = await server_faults.take_snapshot(own, folder)
                yield
                await server_faults.restart_valkey(own, older)
            case _:
                raise TypeError(act)

    @asynccontextmanager
    async def _of_the_provider(self, behaviour: Behaviour) -> AsyncGenerator[None]:
        self._stage.provider.behave(replace(behaviour, seed=self._stage.plan.seed))
        try:
            yield
        finally:
            self._stage.provider.behave(CALM)


@asynccontextmanager
async def _of_a_receiver(act: Act, receiver: Receiver) -> AsyncGenerator[None]:
    match act:
        case Act.RECEIVER_ERRORS:
            receiver.inner.answer(500)
            try:
                yield
            finally:
                receiver.inner.answer(200)
        case Act.RECEIVER_HANG:
            async with receiver.proxy.during(BlackHole()):
                yield
        case _:
            async with receiver.proxy.during(Reset()):
                yield


def _network_fault(wire: Wire, event: Event) -> NetworkFault:
    late = timedelta(milliseconds=250)
    faults: dict[Wire, NetworkFault] = {
        Wire.LATENCY: Latency(late, jitter=late, seed=round(event.at * 100)),
        Wire.DROP: Drop(),
        Wire.BLACK_HOLE: BlackHole(),
        Wire.HALF_OPEN: HalfOpen(),
        Wire.ONE_WAY: OneWay(),
        Wire.RESET: Reset(),
        Wire.TRUNCATE: Truncate(after=700),
        Wire.BANDWIDTH: Bandwidth(bytes_per_second=4000),
    }
    return faults[wire]


def _whom(event: Event) -> str:
    several = event.fault.victim in (Victim.WORKER, Victim.PRODUCER, Victim.RECEIVER)
    return f"{event.fault.victim} {event.victim}" if several else str(event.fault.victim)
