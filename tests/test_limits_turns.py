"""Whose turn it is behind a limit: whoever waits there keeps its place, whatever its name."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import pytest

from headrace_shared.configuration import Configuration
from headrace_shared.dispatch import keys, limits
from headrace_shared.dispatch.connection import Redis
from headrace_shared.dispatch.dispatch import Dispatch, Entry
from headrace_shared.dispatch.limits import AdmitRequest, Report
from headrace_shared.ids import Lane, RouteName, Tenant, new_job_id
from headrace_shared.job import Queue
from headrace_shared.limits import LimitKind
from headrace_shared.routes import Target
from headrace_shared.testing.clock import Clock, script

pytestmark = pytest.mark.conformance

LANE = Lane("default")
LEASE = timedelta(minutes=10)
SECOND = timedelta(seconds=1)


@dataclass(frozen=True, slots=True)
class Line:
    """Jobs that wait in line for the limits of a provider."""

    dispatch: Dispatch
    clock: Clock

    async def limit(self, **ceilings: int) -> None:
        document: Mapping[str, object] = {"limits": {"openai": ceilings}}
        await limits.publish(self.dispatch.redis, 1, Configuration.from_document(document))

    async def push(self, tenants: Sequence[str], *, route: str = "x", count: int = 1) -> list[Entry]:
        queues = [Queue(LANE, RouteName(route), Tenant(tenant)) for tenant in tenants]
        new = [Entry(queue, new_job_id()) for queue in queues for _ in range(count)]
        await self.dispatch.push([(entry, timedelta(0)) for entry in new])
        return new

    async def claim(self, slots: int = 10) -> list[Entry]:
        return (await self.dispatch.claim(slots, {LANE: 1}, LEASE, SECOND)).entries

    async def let_go(self, entries: Sequence[Entry]) -> None:
        """Call for all of them, and end them."""
        requests = [AdmitRequest(str(one.id), Target("openai", one.queue.route), 0, 1) for one in entries]
        await limits.admit(self.dispatch.redis, 1, requests)
        await self.dispatch.finish([(one, None) for one in entries])

    async def go_on(self, times: int, apart: timedelta = SECOND) -> list[Entry]:
        """Let time pass, and what may go by then."""
        gone: list[Entry] = []
        for _ in range(times):
            await self.clock.advance(apart)
            for _ in range(3):
                found = await self.claim()
                await self.let_go(found)
                gone += found
        return gone


@pytest.fixture
def line(dispatch: Dispatch, clock: Clock) -> Line:
    return Line(dispatch, clock)


async def test_the_queues_of_a_tenant_take_turns_behind_one_limit(line: Line) -> None:
    await line.limit(requests_per_minute=60)
    for route in ("x", "y", "z"):
        await line.push(["a"], route=route, count=20)
    gone = Counter(entry.queue.route for entry in await line.go_on(15))
    assert max(gone.values()) - min(gone.values()) <= 1, gone
    assert len(gone) == 3


async def test_whoever_waits_behind_many_is_next_when_it_is_its_turn(line: Line) -> None:
    """More queues than one claim looks at wait for the same moment, and by name the last one is next."""
    others = [f"tenant-{number:03}" for number in range(250)]
    await line.push(others, count=3)
    served = await line.claim(len(others))
    await line.dispatch.finish([(one, None) for one in served])
    assert len({one.queue for one in served}) == len(others)
    await line.limit(requests_per_minute=60)
    await limits.report(
        line.dispatch.redis, [Report("openai", wait=5 * SECOND, refused={LimitKind.REQUESTS: 1})]
    )
    (last,) = await line.push(["zebra"])
    while await line.claim():
        pass
    gone = await line.go_on(1, 6 * SECOND)
    assert last in gone


async def test_what_a_tenant_had_is_known_for_as_long_as_a_limit_keeps_it_waiting(
    line: Line, redis: Redis
) -> None:
    await line.limit(requests_per_minute=1)
    await line.push(["a", "b"], count=3)
    (first,) = await line.go_on(1)
    assert await line.claim() == []
    left = script("return redis.call('PTTL', KEYS[1])")
    known_for = await redis.evaluate(left, [f"{keys.OWED}{LANE}:{first.queue.tenant}"])
    assert isinstance(known_for, int)
    assert known_for >= 55_000


async def test_a_job_that_was_claimed_and_never_called_keeps_its_limit_for_a_moment_only(
    line: Line,
) -> None:
    await line.limit(concurrent=1)
    await line.push(["a"], count=3)
    assert len(await line.claim()) == 1
    assert await line.claim() == []
    await line.clock.advance(SECOND)
    assert len(await line.claim()) == 1
