"""Breakers of a fleet: when they open, who probes, and what closes them."""

import asyncio
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest

from headrace_shared.configuration import Configuration
from headrace_shared.dispatch import breakers
from headrace_shared.dispatch.connection import Redis
from headrace_shared.dispatch.dispatch import Dispatch, Gate, GateReason
from headrace_shared.ids import HoldId
from headrace_shared.outcome import ErrorClass, Failure
from headrace_shared.routes import Target
from headrace_shared.store.configurations import Versioned
from headrace_shared.store.pool import Pool
from headrace_shared.testing.clock import Clock
from headrace_shared.testing.spending import flush
from headrace_shared.usage import NO_USAGE, Finish
from headrace_workers.breaker import Breaker, Breakers, NotNow, Permit
from headrace_workers.configured import Configured
from headrace_workers.replies import Answered, Refused, Reply, Unknown

TARGET = Target("openai", "gpt-4o")
SHARED_ROUTE = Target("openai", "o3")
GATE = Gate("route:gpt-4o", GateReason.BREAKER)
SECOND, WINDOW, LEASE = timedelta(seconds=1), timedelta(seconds=60), timedelta(seconds=30)
COOLED = timedelta(seconds=13)
"""Longer than the cooldown with all of its jitter."""

OK = Answered(SECOND, 200, None, b"{}", NO_USAGE, Finish.COMPLETE)
BAD = Refused(SECOND, Failure(ErrorClass.TRANSIENT, "503"), 503)

Process = Callable[[], Breakers]


@pytest.fixture
def process(dispatch: Dispatch, pool: Pool) -> Process:
    """Another process of the fleet."""
    two = [{"provider": "openai", "model": model} for model in ("o3", "o4")]
    breaker = {
        "failure_rate": 0.5,
        "minimum_calls": 10,
        "window": "60s",
        "cooldown": "10s",
        "probe_lease": "30s",
    }
    document = {"breaker": breaker, "routes": {"either": {"targets": two}, "o3": {"targets": two}}}
    configuration = Configuration.from_document(document)
    return lambda: Breakers(dispatch, Configured(pool, Versioned(0, configuration)))


async def call(breaker: Breaker, *replies: Reply, owner: str = "job:1:1") -> Permit | NotNow:
    """Make calls one after the other, each with leave of its own; return the last one's."""
    permit: Permit | NotNow = Permit()
    for reply in replies:
        permit = await breaker.admit(HoldId(owner))
        if isinstance(permit, Permit):
            assert await breaker.call(permit, _answering(reply)) is reply
    return permit


def _answering(reply: Reply) -> Callable[[], asyncio.Future[Reply]]:
    def send() -> asyncio.Future[Reply]:
        future = asyncio.get_running_loop().create_future()
        future.set_result(reply)
        return future

    return send


async def admitted(breaker: Breaker) -> bool:
    return isinstance(await breaker.admit(HoldId("any:1:1")), Permit)


async def opened(process: Process) -> Breaker:
    breaker = process().of(TARGET)
    await call(breaker, *[BAD] * 10)
    assert not await admitted(breaker)
    return breaker


async def is_open(redis: Redis) -> bool:
    return (await breakers.view(redis, TARGET)).is_open


async def test_it_opens_by_the_rate_of_errors_and_not_by_a_row_of_them(process: Process) -> None:
    mixed, steady = process().of(TARGET), process().of(Target("openai", "other"))
    replies: list[Reply] = [OK, BAD]
    await call(mixed, *replies * 4, OK)
    assert await admitted(mixed)
    await call(mixed, BAD)
    assert not await admitted(mixed)
    await call(steady, *[OK] * 30, *[BAD] * 29)
    assert await admitted(steady)


async def test_it_needs_a_minimum_of_calls(process: Process) -> None:
    breaker = process().of(TARGET)
    await call(breaker, *[BAD] * 9)
    assert await admitted(breaker)
    await call(breaker, BAD)
    assert not await admitted(breaker)


@pytest.mark.parametrize(
    ("error_class", "unhealthy"),
    [(one, one in {ErrorClass.TRANSIENT, ErrorClass.TIMEOUT, ErrorClass.UNREADABLE}) for one in ErrorClass],
)
async def test_only_an_unwell_target_opens_it(
    process: Process, error_class: ErrorClass, *, unhealthy: bool
) -> None:
    breaker = process().of(TARGET)
    await call(breaker, *[Refused(SECOND, Failure(error_class, "no"), 429)] * 50)
    assert await admitted(breaker) is not unhealthy


async def test_an_answer_that_nobody_can_have_opens_it(process: Process) -> None:
    breaker = process().of(TARGET)
    await call(breaker, *[Unknown(SECOND, Failure(ErrorClass.UNREADABLE, "?"))] * 10)
    assert not await admitted(breaker)


async def test_failures_fall_out_of_the_window(process: Process, clock: Clock) -> None:
    breaker = process().of(TARGET)
    await call(breaker, *[BAD] * 9)
    await breaker.share()
    await clock.advance(WINDOW)
    assert breaker.is_dirty, "what it knows grows old and would not be looked at"
    await breaker.share()
    assert not breaker.is_dirty
    await call(breaker, BAD)
    assert await admitted(breaker)


async def test_who_looks_with_another_window_takes_nothing_away(
    process: Process, redis: Redis, clock: Clock
) -> None:
    breaker = process().of(TARGET)
    await call(breaker, *[BAD] * 9)
    await breaker.share()
    await clock.advance(timedelta(seconds=45))
    assert (await breakers.view(redis, TARGET)).failed == 0
    await breaker.share()
    await call(breaker, BAD)
    assert not await admitted(breaker)


async def test_it_opens_for_the_whole_fleet_and_closes_the_gate(process: Process, dispatch: Dispatch) -> None:
    one, two, idle = (process().of(TARGET) for _ in range(3))
    await call(one, *[BAD] * 5)
    await one.share()
    await call(two, *[BAD] * 4)
    await two.share()
    assert await admitted(one)
    assert await dispatch.gates() == []
    await call(two, BAD)
    for breaker in (one, idle):
        await breaker.share()
    assert not any([await admitted(breaker) for breaker in (one, two, idle)])
    assert await dispatch.gates() == [str(GATE)]


async def test_a_route_with_another_target_has_no_gate(process: Process, dispatch: Dispatch) -> None:
    breaker = process().of(SHARED_ROUTE)
    await call(breaker, *[BAD] * 10)
    assert breaker.is_open
    assert await dispatch.gates() == []


async def test_of_many_that_ask_one_may_probe(process: Process, clock: Clock) -> None:
    await opened(process)
    contenders = [process().of(TARGET) for _ in range(32)]
    for contender in contenders:
        await contender.share()
    await clock.advance(COOLED)
    asked = [contender.admit(HoldId(f"job:{n}:1")) for n, contender in enumerate(contenders)]
    answers = await asyncio.gather(*asked)
    permits = [answer for answer in answers if isinstance(answer, Permit)]
    assert len(permits) == 1
    assert permits[0].owner is not None
    assert all(answer.delay <= LEASE for answer in answers if isinstance(answer, NotNow))


async def test_nobody_probes_before_the_cooldown_is_over(process: Process, clock: Clock) -> None:
    breaker = await opened(process)
    waits = await breaker.admit(HoldId("job:2:1"))
    assert isinstance(waits, NotNow)
    assert timedelta(seconds=9) < waits.delay <= timedelta(seconds=12)
    await clock.advance(timedelta(seconds=9))
    assert not await admitted(breaker)


async def test_an_answered_probe_closes_it_for_everybody(
    process: Process, dispatch: Dispatch, clock: Clock
) -> None:
    breaker, other = await opened(process), process().of(TARGET)
    await other.share()
    await clock.advance(COOLED)
    assert await call(breaker, OK, owner="probe") == Permit("probe")
    assert await other.admit(HoldId("job:9:1")) == Permit()
    assert await breaker.admit(HoldId("job:9:1")) == Permit()
    assert await dispatch.gates() == []


async def test_a_failed_probe_opens_it_anew(process: Process, dispatch: Dispatch, clock: Clock) -> None:
    breaker = await opened(process)
    await clock.advance(COOLED)
    assert await call(breaker, BAD, owner="probe") == Permit("probe")
    waits = await breaker.admit(HoldId("job:2:1"))
    assert isinstance(waits, NotNow)
    assert timedelta(seconds=9) < waits.delay <= timedelta(seconds=12)
    assert await dispatch.gates() == [str(GATE)]
    await clock.advance(COOLED)
    assert await call(breaker, OK, owner="probe again") == Permit("probe again")
    assert await admitted(breaker)


@pytest.mark.parametrize("end", ["cancelled", "killed"])
async def test_a_probe_that_never_ends_is_free_after_its_lease(
    process: Process, clock: Clock, end: str
) -> None:
    breaker, sent = await opened(process), asyncio.Event()

    async def hang() -> Reply:
        sent.set()
        never: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        return await never

    await clock.advance(COOLED)
    permit = await breaker.admit(HoldId("probe"))
    assert permit == Permit("probe")
    if end == "cancelled":
        probing = asyncio.create_task(breaker.call(Permit("probe"), hang))
        await sent.wait()
        probing.cancel()
        await asyncio.wait([probing])
        assert probing.cancelled()
    else:
        breaker = process().of(TARGET)
        await breaker.share()
    await clock.advance(LEASE - SECOND)
    assert not await admitted(breaker)
    await clock.advance(SECOND)
    assert await call(breaker, OK, owner="next") == Permit("next")
    assert await breaker.admit(HoldId("job:9:1")) == Permit()


async def test_a_call_from_before_it_opened_does_not_close_it(
    process: Process, redis: Redis, clock: Clock
) -> None:
    breaker, answer = process().of(TARGET), asyncio.Event()

    async def late() -> Reply:
        await answer.wait()
        return OK

    calls = [asyncio.create_task(breaker.call(Permit(), late)) for _ in range(20)]
    await asyncio.sleep(0)
    await call(breaker, *[BAD] * 10)
    assert await is_open(redis)
    await clock.advance(COOLED)
    answer.set()
    assert await asyncio.gather(*calls) == [OK] * 20
    assert await breaker.call(Permit(), late) is OK, "admitted before, sent after"
    assert await is_open(redis)
    assert await breaker.admit(HoldId("probe")) == Permit("probe")


async def test_a_probe_whose_lease_went_to_another_closes_nothing(
    process: Process, redis: Redis, clock: Clock
) -> None:
    breaker, answer = await opened(process), asyncio.Event()

    async def slow() -> Reply:
        await answer.wait()
        return OK

    await clock.advance(COOLED)
    assert await breaker.admit(HoldId("slow")) == Permit("slow")
    probing = asyncio.create_task(breaker.call(Permit("slow"), slow))
    await clock.advance(LEASE)
    other = process().of(TARGET)
    await other.share()
    assert await other.admit(HoldId("new")) == Permit("new")
    answer.set()
    await probing
    assert await is_open(redis)
    assert not await admitted(breaker)


async def test_lost_state_is_a_closed_breaker(process: Process, redis: Redis, clock: Clock) -> None:
    breaker = await opened(process)
    await flush(redis)
    assert await admitted(breaker)
    await call(breaker, *[BAD] * 10)
    await clock.advance(COOLED)
    assert await breaker.admit(HoldId("probe")) == Permit("probe")
    await flush(redis)
    assert await breaker.call(Permit("probe"), _answering(OK)) is OK
    assert await admitted(breaker)
    assert not await is_open(redis)


async def test_a_gate_that_nobody_opened_is_opened(process: Process, dispatch: Dispatch) -> None:
    others = [
        Gate("route:gpt-4o", GateReason.PAUSE),
        Gate("route:b%3A1", GateReason.BREAKER),
        Gate("tenant:x", GateReason.BREAKER),
    ]
    for gate in (*others, GATE):
        await dispatch.close_gate(gate, None)
    await opened(process)
    await process().tend_gates()
    assert await dispatch.gates() == sorted({str(GATE), "route:gpt-4o|pause", "tenant:x|breaker"})
    await breakers.close(dispatch.redis, TARGET, None)
    await process().tend_gates()
    assert str(GATE) not in await dispatch.gates()


async def test_a_target_comes_into_question_again_when_it_may_be_probed(
    process: Process, dispatch: Dispatch
) -> None:
    breaker = process().of(SHARED_ROUTE)
    await breakers.open_(dispatch.redis, SHARED_ROUTE, timedelta(milliseconds=20), None)
    await breaker.share()
    while breaker.is_open:
        await breakers.view(dispatch.redis, SHARED_ROUTE)
    assert await call(breaker, OK, owner="probe") == Permit("probe")
    assert not breaker.is_open


@pytest.fixture(params=["Asia/Tokyo", "America/New_York"])
def zone(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", str(request.param))
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("zone")
async def test_the_zone_of_a_worker_does_not_matter(process: Process, clock: Clock) -> None:
    breaker = await opened(process)
    assert isinstance(await breaker.admit(HoldId("early")), NotNow)
    await clock.advance(COOLED)
    assert await call(breaker, BAD, owner="first") == Permit("first")
    assert isinstance(await breaker.admit(HoldId("early")), NotNow)
    await clock.advance(COOLED)
    assert await call(breaker, OK, owner="second") == Permit("second")
    assert await breaker.admit(HoldId("job:9:1")) == Permit()
