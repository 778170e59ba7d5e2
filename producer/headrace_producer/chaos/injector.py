"""Carries the faults of a schedule out, and makes everything well again."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from typing import assert_never

from headrace_producer.chaos.faults import (
    NetworkAct,
    OwnServerAct,
    ProducerAct,
    ProviderAct,
    ReceiverAct,
    ServerAct,
    Victim,
    Way,
    Wire,
    WorkerAct,
    refusal,
)
from headrace_producer.chaos.members import Member
from headrace_producer.chaos.schedule import Event
from headrace_producer.chaos.screen import Screen
from headrace_producer.chaos.stage import CALM, LEASE, Receiver, Stage
from headrace_producer.chaos.watcher import Watcher
from headrace_shared.errors import HeadraceError, InvalidConfiguration
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


class Injector:
    """Does to a stage what a schedule says."""

    def __init__(self, stage: Stage, watcher: Watcher, screen: Screen) -> None:
        self.done: list[str] = []
        """The names of the faults that were carried out."""
        self.not_done: list[str] = []
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
            self.not_done.append(f"{event.fault.name}: {error}")
            self._screen.event(f"{_whom(event)}: {event.fault.name} could not be done: {error}")
        else:
            self.done.append(event.fault.name)
        if event.fault.is_away:
            # After its own start PostgreSQL spares all leases for one lease.
            spared = LEASE.total_seconds() if event.fault.victim is Victim.POSTGRES else 0.0
            self._watcher.away.append((start, time.monotonic() + spared))

    def _caused(self, event: Event) -> AbstractAsyncContextManager[None]:  # noqa: PLR0911 - one of each
        """Return what causes the fault when it is entered, and ends it when it is left."""
        act, number = event.fault.act, event.victim - 1
        match act:
            case NetworkAct():
                way = self._stage.with_way(act.way)[number].ways[act.way]
                return way.during(_network_fault(act.wire, event))
            case WorkerAct():
                return self._of_a_worker(act, self._stage.workers[number])
            case ProducerAct():
                return self._of_a_producer(act, self._stage.producers[number])
            case ServerAct():
                return self._of_a_server(act, event)
            case OwnServerAct():
                return self._of_an_own_server(act, self._own_servers(event), event)
            case ProviderAct():
                return self._of_the_provider(_behaviour(act))
            case ReceiverAct():
                return _of_a_receiver(act, self._stage.receivers[number])
            case _:
                assert_never(act)

    def _own_servers(self, event: Event) -> OwnServers:
        own = self._stage.servers.own
        if own is None:
            raise InvalidConfiguration(where="--faults", reason=refusal(event.fault))
        return own

    @asynccontextmanager
    async def _of_a_worker(self, act: WorkerAct, worker: Member) -> AsyncGenerator[None]:
        async with worker.one_at_a_time:
            match act:
                case WorkerAct.FREEZE:
                    worker.freeze()
                    try:
                        yield
                    finally:
                        worker.thaw()
                    return
                case WorkerAct.KILL:
                    await self._watcher.kill(worker)
                case WorkerAct.REPLACE:
                    await worker.end()
                case WorkerAct.CLOCK_AHEAD | WorkerAct.CLOCK_BEHIND:
                    await worker.end()
                    await worker.start(skewed_by=_HOUR if act is WorkerAct.CLOCK_AHEAD else -_HOUR)
                case _:
                    assert_never(act)
            yield
            await worker.end()
            await worker.start()

    @asynccontextmanager
    async def _of_a_producer(self, act: ProducerAct, producer: Member) -> AsyncGenerator[None]:
        async with producer.one_at_a_time:
            match act:
                case ProducerAct.KILL:
                    await producer.kill()
                case ProducerAct.KILL_BEFORE_PUSH:
                    async with producer.ways[Way.PRODUCER_REDIS].during(BlackHole()):
                        await asyncio.sleep(_BEFORE_PUSH_SECONDS)
                        await producer.kill()
                case _:
                    assert_never(act)
            yield
            await producer.end()
            await producer.start()

    @asynccontextmanager
    async def _of_a_server(self, act: ServerAct, event: Event) -> AsyncGenerator[None]:
        servers = self._stage.servers
        match act:
            case ServerAct.FLUSHALL:
                await server_faults.flush_redis(servers.redis_url)
                yield
            case ServerAct.CLIENT_PAUSE:
                await server_faults.pause_redis(servers.redis_url, timedelta(seconds=event.seconds))
                yield
            case ServerAct.OOM:
                async with server_faults.out_of_memory(servers.redis_url):
                    yield
            case ServerAct.TERMINATE_BACKENDS:
                await server_faults.terminate_backends(servers.postgres_url)
                storm = asyncio.create_task(self._storm())
                try:
                    yield
                finally:
                    storm.cancel()
                    await asyncio.gather(storm, return_exceptions=True)
            case _:
                assert_never(act)

    async def _storm(self) -> None:
        while True:
            await asyncio.sleep(_STORM_SECONDS)
            with suppress(HeadraceError, OSError):
                await server_faults.terminate_backends(self._stage.servers.postgres_url)

    @asynccontextmanager
    async def _of_an_own_server(
        self, act: OwnServerAct, own: OwnServers, event: Event
    ) -> AsyncGenerator[None]:
        match act:
            case OwnServerAct.POSTGRES_RESTART | OwnServerAct.POSTGRES_OUTAGE:
                async with server_faults.postgres_down(own):
                    yield
            case OwnServerAct.POSTGRES_FREEZE:
                async with server_faults.frozen_postgres(own):
                    yield
            case OwnServerAct.REDIS_KILL | OwnServerAct.REDIS_OUTAGE:
                async with server_faults.valkey_down(own):
                    yield
            case OwnServerAct.REDIS_LOSE:
                async with server_faults.valkey_down(own, "lost"):
                    yield
            case OwnServerAct.REDIS_ROLLBACK:
                folder = self._stage.directory / f"snapshot-{event.at:.0f}"
                older = await server_faults.take_snapshot(own, folder)
                yield
                await server_faults.restart_valkey(own, older)
            case _:
                assert_never(act)

    @asynccontextmanager
    async def _of_the_provider(self, behaviour: Behaviour) -> AsyncGenerator[None]:
        self._stage.provider.behave(replace(behaviour, seed=self._stage.plan.seed))
        try:
            yield
        finally:
            self._stage.provider.behave(CALM)


@asynccontextmanager
async def _of_a_receiver(act: ReceiverAct, receiver: Receiver) -> AsyncGenerator[None]:
    match act:
        case ReceiverAct.ERRORS:
            receiver.inner.answer(500)
            try:
                yield
            finally:
                receiver.inner.answer(200)
        case ReceiverAct.HANG:
            async with receiver.proxy.during(BlackHole()):
                yield
        case ReceiverAct.RESET:
            async with receiver.proxy.during(Reset()):
                yield
        case _:
            assert_never(act)


def _behaviour(act: ProviderAct) -> Behaviour:
    match act:
        case ProviderAct.OUTAGE:
            return replace(CALM, outage=True)
        case ProviderAct.RATE_LIMIT:
            return replace(CALM, rate_limited=0.7, retry_after=timedelta(seconds=1))
        case ProviderAct.HANG:
            return replace(CALM, hang=0.3)
        case ProviderAct.CUT:
            return replace(CALM, cut=0.4)
        case ProviderAct.GARBAGE:
            return replace(CALM, garbage=0.4)
        case ProviderAct.SLOW:
            return replace(CALM, latency=timedelta(seconds=2))
        case _:
            assert_never(act)


def _network_fault(wire: Wire, event: Event) -> NetworkFault:  # noqa: PLR0911 - one of each
    match wire:
        case Wire.LATENCY:
            late = timedelta(milliseconds=250)
            return Latency(late, jitter=late, seed=round(event.at * 100))
        case Wire.DROP:
            return Drop()
        case Wire.BLACK_HOLE:
            return BlackHole()
        case Wire.HALF_OPEN:
            return HalfOpen()
        case Wire.ONE_WAY:
            return OneWay()
        case Wire.RESET:
            return Reset()
        case Wire.TRUNCATE:
            return Truncate(after=700)
        case Wire.BANDWIDTH:
            return Bandwidth(bytes_per_second=4000)
        case _:
            assert_never(wire)


def _whom(event: Event) -> str:
    several = event.fault.victim in (Victim.WORKER, Victim.PRODUCER, Victim.RECEIVER)
    return f"{event.fault.victim} {event.victim}" if several else str(event.fault.victim)
