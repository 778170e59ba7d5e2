"""Limits of providers: what is let through, how they are learnt, and who waits where."""

import asyncio
import json
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from itertools import pairwise

import pytest
from command_line import Command

from headrace_shared.configuration import Configuration
from headrace_shared.dispatch import limits
from headrace_shared.dispatch.connection import Redis, Script
from headrace_shared.dispatch.dispatch import Dispatch, Entry
from headrace_shared.dispatch.limits import (
    AdmitRequest,
    Admitted,
    Measure,
    Report,
    Standing,
    Wait,
    limiter_of,
)
from headrace_shared.ids import Lane, RouteName, Tenant, WorkerId, new_job_id
from headrace_shared.job import JobState, Queue
from headrace_shared.jsonvalue import is_table
from headrace_shared.limits import Allowance, LimitKind, Told, exceeded_kind, read_told
from headrace_shared.routes import Target
from headrace_shared.store import configurations, feed
from headrace_shared.store.configurations import Versioned
from headrace_shared.store.pool import Pool
from headrace_shared.testing.clock import Clock, script
from headrace_shared.testing.jobs import MODEL, Jobs, eventually
from headrace_shared.testing.scripted_provider import ScriptedProvider
from headrace_shared.testing.simulated_provider import SimulatedProvider
from headrace_workers.configured import Configured
from headrace_workers.limiting_alone import Alone
from headrace_workers.testing import running_worker

TARGET = Target("openai", MODEL)
OTHER = Target("openai", "gpt-4o")
NAME = limiter_of(TARGET)
SECOND = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)
LANES = {Lane("default"): 1}
LEASE = timedelta(minutes=10)
STEP = timedelta(milliseconds=100)
_MOMENT = Script.load("moment")


@pytest.fixture
def jobs(pool: Pool, dispatch: Dispatch) -> Jobs:
    return Jobs(pool, dispatch)


async def publish(redis: Redis, ceilings: Mapping[str, Mapping[str, int]], version: int = 1) -> None:
    await limits.publish(redis, version, Configuration.from_document({"limits": ceilings}))


def asks(count: int, target: Target = TARGET, *, tokens: int = 100) -> list[AdmitRequest]:
    return [AdmitRequest(f"{new_job_id()}/1/1", target, 0, tokens) for _ in range(count)]


async def admit(
    redis: Redis, count: int, target: Target = TARGET, *, tokens: int = 100
) -> list[Admitted | Wait]:
    decided = await limits.admit(redis, 1, asks(count, target, tokens=tokens))
    assert decided is not None
    return decided[0]


def admitted(verdicts: list[Admitted | Wait]) -> list[Admitted]:
    return [one for one in verdicts if isinstance(one, Admitted)]


async def let_through(redis: Redis, clock: Clock, during: timedelta, *, ask: int = 50) -> int:
    """Ask for more than there is room for, ten times a second, and count what may go."""
    began, count = await server_time(redis), 0
    while await server_time(redis) < began + during:
        count += len(admitted(await admit(redis, ask)))
        await clock.advance(STEP)
    return count


async def server_time(redis: Redis) -> timedelta:
    return timedelta(milliseconds=int(str(await redis.evaluate(_MOMENT))))


@pytest.mark.conformance
async def test_a_bucket_begins_empty_and_is_refilled_all_the_time(redis: Redis, clock: Clock) -> None:
    await publish(redis, {NAME: {"requests_per_minute": 600}})
    first = admitted(await admit(redis, 50))
    assert len(first) <= 12
    gaps = [after.delay - before.delay for before, after in pairwise(first)]
    assert all(timedelta(milliseconds=99) <= gap <= timedelta(milliseconds=102) for gap in gaps)
    await clock.advance(10 * SECOND)
    # What was not used is not made up for: a provider may count by the second.
    assert len(admitted(await admit(redis, 50))) <= 12


@pytest.mark.conformance
async def test_nearly_all_of_a_limit_is_let_through_and_never_more(redis: Redis, clock: Clock) -> None:
    await publish(redis, {NAME: {"requests_per_minute": 1200}})
    assert 0.97 * 600 <= await let_through(redis, clock, 30 * SECOND) <= 600 + 21


@pytest.mark.conformance
async def test_tokens_are_reserved_and_settled_both_ways(redis: Redis, clock: Clock) -> None:
    await publish(redis, {NAME: {"tokens_per_minute": 60_000}})
    (one, *_) = admitted(await admit(redis, 1, tokens=50_000))
    assert one.tokens == 50_000
    assert 45 * SECOND < (await limits.view(redis, [NAME]))[0].standing.wait < 51 * SECOND
    less = Report(NAME, answered=1, tokens=20_000, reserved=50_000, output_tokens=20_000)
    await limits.report(redis, [less])
    assert 15 * SECOND < (await limits.view(redis, [NAME]))[0].standing.wait < 21 * SECOND
    more = Report(NAME, answered=1, tokens=90_000, reserved=50_000, output_tokens=90_000)
    await limits.report(redis, [more])
    assert 55 * SECOND < (await limits.view(redis, [NAME]))[0].standing.wait < 62 * SECOND


@pytest.mark.conformance
async def test_a_provider_s_limit_holds_over_all_of_its_models(redis: Redis, clock: Clock) -> None:
    await publish(redis, {"openai": {"requests_per_minute": 600}})
    both = [*admitted(await admit(redis, 30)), *admitted(await admit(redis, 30, OTHER))]
    assert len(both) <= 12


@pytest.mark.conformance
async def test_permits_are_limited_given_back_and_end_with_their_owner(redis: Redis, clock: Clock) -> None:
    await publish(redis, {NAME: {"concurrent": 3}})
    requests = asks(5)
    decided = await limits.admit(redis, 1, requests)
    assert decided is not None
    assert [isinstance(one, Admitted) for one in decided[0]] == [True, True, True, False, False]
    await limits.report(redis, [Report(NAME, given_back=[requests[0].id])])
    assert len(admitted(await admit(redis, 5))) == 1
    await clock.advance(limits.PERMIT_LEASE - SECOND)
    await limits.report(redis, [Report(NAME, kept=[requests[1].id])])
    await clock.advance(SECOND)
    assert len(admitted(await admit(redis, 5))) == 2


@pytest.mark.conformance
async def test_what_the_provider_says_is_its_limit_holds_below_the_ceiling(
    redis: Redis, clock: Clock
) -> None:
    await publish(redis, {NAME: {"requests_per_minute": 600}})
    await limits.report(redis, [Report(NAME, answered=1, told=Told(Allowance(300), Allowance(10**9)))])
    assert 0.97 * 50 <= await let_through(redis, clock, 10 * SECOND) <= 50 + 6
    await limits.report(redis, [Report(NAME, answered=1, told=Told(Allowance(6000)))])
    assert 0.97 * 100 <= await let_through(redis, clock, 10 * SECOND) <= 100 + 12


@pytest.mark.conformance
async def test_what_is_left_is_spread_over_the_time_until_it_is_whole_again(
    redis: Redis, clock: Clock
) -> None:
    await publish(redis, {NAME: {"requests_per_minute": 600}})
    left = Told(Allowance(600, remaining=50, whole_in=20 * SECOND))
    await limits.report(redis, [Report(NAME, answered=1, told=left)])
    assert await let_through(redis, clock, 20 * SECOND) <= 50 + 12
    assert await let_through(redis, clock, 10 * SECOND) >= 0.9 * 100


@pytest.mark.conformance
async def test_a_refusal_stops_everybody_and_then_slows_them_down(redis: Redis, clock: Clock) -> None:
    await publish(redis, {NAME: {"requests_per_minute": 600}})
    await limits.report(redis, [Report(NAME, refused={LimitKind.REQUESTS: 1}, wait=20 * SECOND)])
    (refused, *_) = await admit(redis, 1)
    assert isinstance(refused, Wait)
    assert 19 * SECOND < refused.delay < 21 * SECOND
    (view,) = await limits.view(redis, [NAME])
    assert [(one.what, one.limit, one.source) for one in view.measures] == [("requests", 600, "configured")]
    assert view.standing.cooling > 19 * SECOND
    assert view.standing.requests_per_minute is not None
    assert 560 < view.standing.requests_per_minute < 597
    await clock.advance(21 * SECOND)
    assert len(admitted(await admit(redis, 1))) == 1


@pytest.mark.conformance
async def test_refusals_of_calls_that_were_out_already_cut_nothing_more(redis: Redis, clock: Clock) -> None:
    await publish(redis, {NAME: {"requests_per_minute": 600}})

    async def in_force() -> int | None:
        return (await limits.view(redis, [NAME]))[0].standing.requests_per_minute

    await limits.report(redis, [Report(NAME, refused={LimitKind.REQUESTS: 1}, wait=SECOND)])
    once = await in_force()
    late = Report(NAME, refused={LimitKind.REQUESTS: 9}, wait=SECOND, refused_age=SECOND)
    await limits.report(redis, [late])
    assert await in_force() == once
    await clock.advance(2 * SECOND)
    for _ in range(3):
        await limits.report(redis, [Report(NAME, refused={LimitKind.REQUESTS: 1}, wait=SECOND)])
        await clock.advance(SECOND)
    assert once is not None
    assert (await in_force() or 0) < 0.95 * once


@pytest.mark.conformance
async def test_a_limit_that_nobody_knows_is_found_by_refusals_alone(redis: Redis, clock: Clock) -> None:
    await publish(redis, {})
    assert len(admitted(await admit(redis, 200))) == 200
    for _ in range(9):
        await limits.report(redis, [Report(NAME, refused={LimitKind.REQUESTS: 100}, wait=SECOND)])
        await clock.advance(2 * SECOND)
    assert len(admitted(await admit(redis, 200))) < 60


@pytest.mark.conformance
async def test_a_claim_takes_no_more_jobs_of_a_model_than_may_go_and_others_overtake(
    redis: Redis, dispatch: Dispatch, clock: Clock
) -> None:
    await publish(redis, {NAME: {"requests_per_minute": 60}})
    limited = Queue(Lane("default"), RouteName(MODEL), Tenant("acme"))
    free = Queue(Lane("default"), RouteName("gpt-4o"), Tenant("acme"))
    for queue in (limited, free):
        entries = [Entry(queue, new_job_id()) for _ in range(20)]
        await dispatch.push([(entry, timedelta(0)) for entry in entries])
    claim = await dispatch.claim(30, LANES, LEASE, SECOND)
    queues = [entry.queue for entry in claim.entries]
    assert (queues.count(limited), queues.count(free)) == (1, 20)
    assert claim.next_due is not None
    assert claim.next_due <= SECOND
    assert (await dispatch.claim(30, LANES, LEASE, SECOND)).entries == []
    await admit(redis, 1)
    assert (await dispatch.claim(30, LANES, LEASE, SECOND)).entries == []
    await clock.advance(SECOND)
    assert len((await dispatch.claim(30, LANES, LEASE, SECOND)).entries) == 1


@pytest.mark.conformance
async def test_a_handler_waits_for_no_limit_before_it_calls(redis: Redis, dispatch: Dispatch) -> None:
    """Nobody knows which models it will call; the default provider's limits are not its own."""
    await publish(redis, {"openai": {"concurrent": 1}})
    await admit(redis, 1)
    handlers = Queue(Lane("default"), RouteName("handler:summarise"), Tenant("acme"))
    await dispatch.push([(Entry(handlers, new_job_id()), timedelta(0)) for _ in range(3)])
    assert len((await dispatch.claim(30, LANES, LEASE, SECOND)).entries) == 3


@pytest.mark.conformance
async def test_a_wiped_server_says_so_and_lets_nothing_burst(redis: Redis, clock: Clock) -> None:
    await publish(redis, {NAME: {"requests_per_minute": 60}})
    await admit(redis, 1)
    await redis.administer("FLUSHDB")
    assert await limits.admit(redis, 1, asks(1)) is None
    await publish(redis, {NAME: {"requests_per_minute": 60}})
    assert len(admitted(await admit(redis, 50))) <= 2


@pytest.mark.conformance
async def test_limits_of_an_older_configuration_are_not_gone_by(redis: Redis, clock: Clock) -> None:
    await publish(redis, {NAME: {"requests_per_minute": 60}}, version=2)
    await publish(redis, {}, version=1)
    assert await limits.admit(redis, 3, asks(1)) is None
    assert len(admitted(await admit(redis, 50))) <= 2


@pytest.mark.conformance
@pytest.mark.parametrize("value", ["inf", "nan", "9e15", "soon", "-1e15"])
async def test_foreign_bytes_keep_no_call_for_ever(redis: Redis, clock: Clock, value: str) -> None:
    await publish(redis, {NAME: {"requests_per_minute": 600}})
    write = script("return redis.call('HSET', 'headrace:limiter:' .. ARGV[1], ARGV[2], ARGV[3])")
    for field in ("requests.next", "cool", "claimed"):
        await redis.evaluate(write, (), [NAME, field, value])
    assert admitted(await admit(redis, 1))


@pytest.mark.parametrize(
    ("reset", "expected"),
    [
        ("6m0s", 6 * MINUTE),
        ("12ms", timedelta(milliseconds=12)),
        ("1.5s", 1.5 * SECOND),
        ("1h2m3s", 62 * MINUTE + 3 * SECOND),
        ("7", 7 * SECOND),
        ("soon", None),
        ("", None),
        ("9" * 400 + "s", None),
    ],
)
def test_headers_of_limits_are_read(reset: str, expected: timedelta | None) -> None:
    headers = {
        "x-ratelimit-limit-requests": "3000",
        "x-ratelimit-remaining-requests": "7",
        "x-ratelimit-reset-requests": reset,
    }
    told = read_told(headers)
    assert told == Told(Allowance(3000, 7, expected))


@pytest.mark.parametrize("limit", ["", "-5", "0", "3e3", "²", "9" * 60])
def test_nonsense_in_headers_counts_as_absent(limit: str) -> None:
    assert read_told({"x-ratelimit-limit-tokens": limit}) is None


def test_a_refusal_is_about_what_it_names_or_what_has_nothing_left() -> None:
    assert exceeded_kind(None, "Limit reached on tokens per min (TPM)") is LimitKind.TOKENS
    assert exceeded_kind(None, "Too many requests") is LimitKind.REQUESTS
    assert exceeded_kind(Told(None, Allowance(9, 0)), "slow down") is LimitKind.TOKENS


@pytest.mark.usefixtures("environment")
async def test_jobs_wait_for_a_limit_without_a_slot_and_another_model_overtakes(
    jobs: Jobs, provider: SimulatedProvider
) -> None:
    await jobs.configure({"limits": {f"openai/{MODEL}": {"requests_per_minute": 30}}})
    slow = await jobs.add(12)
    fast = await jobs.add(8, model="gpt-4o")
    async with running_worker(concurrency=2):
        await jobs.ended(fast)
        states = [(await jobs.row(job_id))["state"] for job_id in slow]
        assert states.count("succeeded") <= 3
        assert [(await jobs.row(job_id))["attempts"] for job_id in slow] == [0] * len(slow)


@pytest.mark.usefixtures("environment")
async def test_no_more_calls_are_under_way_than_a_limit_allows(
    jobs: Jobs, silent: ScriptedProvider, redis: Redis
) -> None:
    await jobs.configure({"limits": {"openai": {"concurrent": 2}}})
    added = await jobs.add(5)
    async with running_worker():
        await silent.arrived(2)
        (view,) = await limits.view(redis, ["openai"])
        assert view.measures == (Measure("concurrent", 2, "configured", 2, 2),)
        assert len(silent.requests) == 2
        silent.open.set()
        endings = await jobs.ended(added)
    assert {ending.job.state for ending in endings} == {JobState.SUCCEEDED}


@pytest.mark.usefixtures("environment")
async def test_limits_are_set_shown_and_taken_away(command: Command, redis: Redis, pool: Pool) -> None:
    assert "No limit" in (await command("limits", "show")).out
    name = "openai/org/model:1"
    priced = Configuration.from_document({"prices": {name: {"input": 1, "output": 1}}})
    await configurations.apply(pool, priced, "test")
    done = await command("limits", "set", name, "--requests", "600", "--concurrent", "3", "--json")
    assert done.answer == {
        "limiter": name,
        "version": 2,
        "requests_per_minute": 600,
        "tokens_per_minute": None,
        "concurrent": 3,
    }
    target = Target.parse(name)
    assert len(admitted(await admit(redis, 9, target))) == 3
    told = Told(Allowance(500), Allowance(9000))
    await limits.report(redis, [Report(limiter_of(target), answered=1, tokens=90, told=told)])
    (shown,) = (await command("limits", "show", "--json")).rows("limits")
    assert shown["limiter"] == name
    measures = {what: one for what, one in shown.items() if is_table(one)}
    assert {what: (one["limit"], one["source"]) for what, one in measures.items()} == {
        "requests": (500, "learned"),
        "tokens": (9000, "learned"),
        "concurrent": (3, "configured"),
    }
    assert measures["concurrent"]["used"] == 3
    assert name in (await command("limits", "show")).out
    away = await command("limits", "set", name, "--concurrent", "0", "--json")
    assert (away.answer["requests_per_minute"], away.answer["concurrent"]) == (600, None)


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("openai",), "Nothing is set"),
        (("nobody/gpt-4o", "--requests", "1"), "there is no provider 'nobody'"),
        (("openai/", "--requests", "1"), "provider/model"),
        (("openai", "--tokens", "-1"), "--tokens"),
        (("openai/gpt-4o-mimi", "--requests", "1"), "names (known: any model of openai that has a price)"),
    ],
)
async def test_a_limit_of_nobody_or_of_nothing_is_refused_and_changes_nothing(
    command: Command, pool: Pool, arguments: tuple[str, ...], problem: str
) -> None:
    refused = await command("limits", "set", *arguments)
    assert refused.code == 2
    assert problem in refused.err
    assert (await configurations.current(pool)).version == 0


@pytest.mark.usefixtures("environment")
async def test_a_model_has_a_limit_where_a_route_or_a_price_names_it(command: Command, pool: Pool) -> None:
    base = {"base_url": "http://127.0.0.1:1/v1"}
    document: dict[str, object] = {
        "providers": {"local": base, "other": base},
        "routes": {"fast": {"targets": [{"provider": "local", "model": "small"}]}},
        "prices": {"other/large": {"input": 1, "output": 1}},
        "defaults": {"any_model": False},
    }
    await configurations.apply(pool, Configuration.from_document(document), "test")
    for name in ("local/small", "other/large", "openai"):
        assert (await command("limits", "set", name, "--requests", "1")).code == 0
    for name in ("local/large", "openai/gpt-4o"):
        refused = await command("limits", "set", name, "--requests", "1")
        assert refused.code == 2
        assert f"nothing calls '{name}', which no route and no price names" in refused.err
        assert "(known: local/small, other/large)." in refused.err


@pytest.mark.usefixtures("environment")
async def test_a_limit_that_is_set_without_redis_is_in_force_and_said_so(
    command: Command, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_REDIS_URL", "redis://127.0.0.1:1")
    done = await command("limits", "set", "openai", "--requests", "600", "--json")
    assert (done.code, "Workers hear of it later" in done.err, done.answer["version"]) == (0, True, 1)
    assert (await configurations.current(pool)).configuration.limits["openai"].requests_per_minute == 600


@pytest.mark.usefixtures("environment")
async def test_of_two_changes_at_once_none_is_lost_and_the_later_is_refused(
    command: Command, pool: Pool
) -> None:
    theirs = Configuration.from_document({"limits": {"openai": {"concurrent": 3}}})
    async with pool.acquire() as connection:
        held = connection.transaction()
        await held.start()
        await connection.execute("SELECT pg_advisory_xact_lock(4850, 3)")
        mine = asyncio.create_task(command("limits", "set", "openai", "--requests", "600", "--json"))
        waits = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        await eventually(partial(pool.fetchval, waits), lambda count: count == 1)
        await connection.execute(
            "INSERT INTO headrace.configurations (document, source, applied_at) VALUES ($1, 'theirs', now())",
            json.dumps(theirs.document()),
        )
        await held.commit()
    done = await mine
    assert done.code == 2
    assert "version 1 is in force, not 0" in done.err
    assert await configurations.current(pool) == Versioned(1, theirs)
    assert (await command("limits", "set", "openai", "--requests", "600")).code == 0
    both = (await configurations.current(pool)).configuration.limits["openai"]
    assert (both.requests_per_minute, both.concurrent) == (600, 3)


async def test_without_redis_each_worker_keeps_its_share_of_what_was_known(pool: Pool) -> None:
    name = f"openai/{MODEL}"
    document = {"limits": {name: {"requests_per_minute": 600, "concurrent": 4}}}
    configured = Configured(pool, Versioned(1, Configuration.from_document(document)))
    under_way = Counter[str]()
    alone = Alone(configured, pool, under_way.__getitem__)
    for worker in ("one", "two"):
        await feed.register_worker(pool, WorkerId(worker), host="", slots=1, lanes=["default"], alive=MINUTE)
    verdicts: list[Admitted | Wait] = []
    for one in asks(5):
        verdicts.append(await alone.admit(one))
        under_way[NAME] += isinstance(verdicts[-1], Admitted)
    # Two of four under way, and the second no sooner than a fifth of a second after the first.
    assert [isinstance(one, Admitted) for one in verdicts] == [True, True, False, False, False]
    first, second = admitted(verdicts)
    assert second.delay - first.delay >= timedelta(milliseconds=150)
    under_way[NAME] -= 1
    assert isinstance(await alone.admit(asks(1)[0]), Admitted)
    alone.learn([Standing(NAME, timedelta(0), 6, None, 4, timedelta(0))])
    assert isinstance(await alone.admit(asks(1)[0]), Wait)
