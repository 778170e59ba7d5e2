"""The chaos command: its schedule, its refusals, and that its auditor sees what is wrong."""

import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace_producer import Headrace, cli
from headrace_producer.chaos import acks, records
from headrace_producer.chaos.acks import AckFile, Line, Promises
from headrace_producer.chaos.auditor import MOST_CONNECTIONS, Finding, Verdict, audit
from headrace_producer.chaos.canaries import KEY_MARK, Canaries
from headrace_producer.chaos.collector import SpanCollector
from headrace_producer.chaos.evidence import Booked, Calm, Evidence, Leaks, Log, Received
from headrace_producer.chaos.faults import FAULTS, Fault, Needs, Victim, choose
from headrace_producer.chaos.injector import Injector
from headrace_producer.chaos.records import AttemptRow, CallRow, DeliveryRow, Ending, JobRow
from headrace_producer.chaos.report import Report, show
from headrace_producer.chaos.schedule import Event, schedule
from headrace_producer.chaos.screen import Screen
from headrace_producer.chaos.servers import Servers
from headrace_producer.chaos.stage import CALM, Plan, Stage
from headrace_producer.chaos.watcher import Recovery, Seen, Watcher
from headrace_producer.chaos.work import BATCH, Tenants, keys_of, wish_of
from headrace_shared.budgets import Budgets
from headrace_shared.configuration import parse_toml
from headrace_shared.dispatch.connection import Redis
from headrace_shared.money import NanoUSD
from headrace_shared.store.pool import Pool
from headrace_shared.testing.clock import script
from headrace_shared.testing.simulated_provider import SimulatedProvider

TENANTS = Tenants.of("chaos-1")
VICTIMS = {Victim.WORKER: 3, Victim.PRODUCER: 2, Victim.RECEIVER: 4}
FAULT_SETS = st.lists(st.sampled_from(sorted(FAULTS)), min_size=1, unique=True).map(
    lambda names: [FAULTS[name] for name in names]
)
SEEDS = st.integers(0, 1_000_000)
SECONDS = st.floats(15, 400)


@given(SEEDS, SECONDS, FAULT_SETS)
def test_the_same_seed_gives_the_same_schedule(seed: int, seconds: float, faults: list[Fault]) -> None:
    assert schedule(seed, seconds, faults, VICTIMS) == schedule(seed, seconds, list(faults), dict(VICTIMS))


@given(SEEDS, SECONDS, FAULT_SETS)
def test_every_fault_ends_before_the_calm(seed: int, seconds: float, faults: list[Fault]) -> None:
    for event in schedule(seed, seconds, faults, VICTIMS):
        assert 0 < event.at < event.until <= seconds
        assert event.fault.shortest - 0.01 <= event.seconds <= event.fault.longest
        assert 1 <= event.victim <= VICTIMS.get(event.fault.victim, 1)


@given(SEEDS, SECONDS, FAULT_SETS)
def test_nobody_suffers_two_faults_at_a_time(seed: int, seconds: float, faults: list[Fault]) -> None:
    well_at: dict[tuple[Victim, int], float] = {}
    for event in schedule(seed, seconds, faults, VICTIMS):
        assert event.at >= well_at.get(event.place, 0)
        well_at[event.place] = event.until


def test_other_seeds_give_other_schedules() -> None:
    faults = list(FAULTS.values())
    assert len({schedule(seed, 60, faults, VICTIMS) for seed in range(20)}) == 20


def test_a_long_run_does_everything_there_is() -> None:
    events = schedule(7, 1200, list(FAULTS.values()), VICTIMS)
    assert {event.fault.name for event in events} == FAULTS.keys()


def test_a_key_says_all_about_its_job() -> None:
    keys = {key for number in range(400) for producer in (1, 2) for key in keys_of(1, producer, number)}
    wishes = [wish_of(1, key, TENANTS, "canary") for key in sorted(keys)]
    assert wishes == [wish_of(1, key, TENANTS, "canary") for key in sorted(keys)]
    assert len({wish.prompt_hash for wish in wishes}) == len(keys), "a prompt tells whose call it is"
    assert {wish.tenant for wish in wishes} == set(TENANTS.all)
    assert all(wish.key.startswith(KEY_MARK) and "canary" in wish.prompt for wish in wishes)
    assert any(wish.callers > 1 for wish in wishes)
    assert any(wish.cancel_after == 0 for wish in wishes)
    assert any(wish.delay for wish in wishes)
    assert BATCH in {len(keys_of(1, 1, number)) for number in range(400)}
    assert any(keys_of(1, 1, number) == keys_of(1, 2, number) for number in range(400))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.run(["chaos", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(autouse=True)
def no_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEADRACE_POSTGRES_URL", raising=False)
    monkeypatch.delenv("HEADRACE_REDIS_URL", raising=False)


@pytest.fixture
def given_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_POSTGRES_URL", "postgresql://127.0.0.1:1/nothing")
    monkeypatch.setenv("HEADRACE_REDIS_URL", "redis://127.0.0.1:1")


def test_every_fault_is_listed_on_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(FAULTS)
    assert len(FAULTS) >= 30
    code, out, _ = run(capsys, "--list", "--json")
    assert json.loads(out.splitlines()[-1]) == {"faults": list(FAULTS)}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--faults", "drop-worker-redis,earthquake"], "there is no fault 'earthquake'"),
        (["--faults", ""], "there is no fault ''"),
        (["--minutes", "0"], "--minutes: must be from 0.25 to 1,440"),
        (
            ["--minutes", "0.25", "--faults", "redis-outage"],
            "--minutes: is too short for any of these faults",
        ),
        (["--minutes", "nan"], "--minutes: must be from 0.25 to 1,440"),
        (["--workers", "0"], "'--workers'"),
        (["--seed", "x"], "'--seed'"),
    ],
)
def test_bad_input_is_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert sentence in err
    assert (out, err.count("\n")) == ("", 1)


@pytest.mark.usefixtures("given_servers")
@pytest.mark.parametrize("name", ["flushall", "oom", "client-pause", "terminate-backends", "redis-kill"])
def test_given_servers_are_spared(capsys: pytest.CaptureFixture[str], name: str) -> None:
    code, _, err = run(capsys, "--faults", f"worker-kill,{name}")
    assert code == 2
    assert f"--faults: {name} " in err


@pytest.mark.usefixtures("given_servers")
def test_given_servers_that_are_away_are_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "--faults", "flushall", "--allow-server-faults", "--minutes", "1")
    assert code == 2
    assert "cannot be reached" in err


def test_what_may_be_done_depends_on_whose_servers_they_are() -> None:
    anywhere = choose(None, own_servers=False, allow_server_faults=False)
    assert {fault.needs for fault in anywhere} == {Needs.NOTHING}
    allowed = choose(None, own_servers=False, allow_server_faults=True)
    assert {fault.needs for fault in allowed} == {Needs.NOTHING, Needs.LEAVE}
    assert choose(None, own_servers=True, allow_server_faults=False) == tuple(FAULTS.values())
    by_pattern = choose(["drop-*"], own_servers=False, allow_server_faults=False)
    assert len(by_pattern) == 5


async def test_an_installation_in_use_is_refused(
    postgres_url: str,
    redis_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with Headrace(postgres_url, redis_url) as client:
        await client.enqueue("/v1/embeddings", {"model": "text-embedding-3-small", "input": "x"})
    redis = Redis(redis_url)
    await redis.evaluate(script("return redis.call('FLUSHDB')"))
    await redis.close()
    monkeypatch.setenv("HEADRACE_POSTGRES_URL", postgres_url)
    monkeypatch.setenv("HEADRACE_REDIS_URL", redis_url)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", "headrace_producer", "chaos", "--minutes", "1", stderr=subprocess.PIPE
    )
    _, said = await process.communicate()
    assert process.returncode == 2
    assert b"somebody uses Headrace there (unfinished jobs): give chaos an empty database" in said


def test_promises_are_read_back_from_a_file_that_was_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "acks"
    file = AckFile(path)
    file.write(Line(key="a", asked=1), Line(key="b", asked=2))
    file.write(Line(key="a", job=UUID(int=1)), Line(key="a", cancelled=True))
    file.close()
    with path.open("a") as cut:
        cut.write('{"key": "b", "jo')
    promises = acks.read([path, tmp_path / "none"])
    assert promises.acked == {"a": {UUID(int=1)}}
    assert promises.unresolved == ["b"]
    assert promises.cancels == 1


async def test_what_is_read_of_the_store_is_there(pool: Pool) -> None:
    async with pool.acquire() as connection:
        await connection.execute("INSERT INTO headrace.budgets VALUES ('global', 'total', 5, 'wait', now())")
        assert await records.budgets(connection) == [("global", 0, 5)]
        assert await records.progress(connection, TENANTS) == records.Progress()
        assert await records.still_held(connection, []) == 0
        assert await records.count_workers(connection) == 0
        assert not any((await records.somebodys(connection, "chaos")).values())
        for read in (
            records.holdings,
            records.all_jobs,
            records.all_calls,
            records.all_attempts,
            records.all_deliveries,
        ):
            assert await read(connection, TENANTS) == []
        assert await records.endings(connection, TENANTS, datetime.now(UTC)) == []


async def test_canaries_are_found_in_redis_and_in_files(redis: Redis, tmp_path: Path) -> None:
    canaries = Canaries.new()
    assert await canaries.in_redis(redis) == []
    await redis.evaluate(
        script("redis.call('HSET', 'headrace:x', 'f', ARGV[1]) return 1"), (), [canaries.word]
    )
    await redis.evaluate(
        script("redis.call('RPUSH', 'headrace:y', ARGV[1]) return 1"), (), [canaries.api_key]
    )
    await redis.evaluate(script("redis.call('SET', 'headrace:z', 'clean') return 1"))
    assert sorted(await canaries.in_redis(redis)) == ["headrace:x", "headrace:y"]
    (tmp_path / "a.log").write_text("nothing\n")
    (tmp_path / "b.log").write_text(f"key {canaries.master}\n")
    assert canaries.in_files([tmp_path / "a.log", tmp_path / "b.log"]) == (
        2,
        ["the webhooks' secret is in b.log"],
    )


async def test_a_fault_that_could_not_be_done_is_told_from_one_that_was(
    redis_url: str, pool: Pool, redis: Redis, tmp_path: Path
) -> None:
    screen = Screen()
    stage = Stage(
        plan=Plan(1, 1.0, 0, 1.0),
        directory=tmp_path,
        servers=Servers("postgresql://127.0.0.1:1/nothing", redis_url, own=None),
        pool=pool,
        redis=redis,
        budgets=Budgets(pool, redis),
        configuration=parse_toml("", "nothing"),
        tenants=TENANTS,
        canaries=Canaries.new(),
        provider=SimulatedProvider(CALM),
        receivers=(),
        spans=SpanCollector(),
        workers=(),
        producers=(),
    )
    names = ("provider-slow", "terminate-backends", "redis-kill")
    injector = Injector(stage, Watcher(stage, screen), screen)
    await injector.run([Event(0.0, FAULTS[name], 1, 0.0) for name in names])
    assert injector.done == ["provider-slow"]
    assert [words.split(":")[0] for words in sorted(injector.not_done)] == [
        "redis-kill",
        "terminate-backends",
    ]


async def test_a_process_can_have_a_wrong_clock() -> None:
    program = (
        "from headrace_producer.chaos.skewed import shift; shift(-3600)\n"
        "import time, datetime\n"
        "now = datetime.datetime.now(datetime.UTC)\n"
        "assert isinstance(now - datetime.timedelta(1), datetime.datetime)\n"
        "print(time.time(), time.time_ns() / 1e9, now.timestamp(), datetime.datetime.now().timestamp())"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=subprocess.PIPE)
    shown, _ = await process.communicate()
    assert len(shown.split()) == 4
    for moment in shown.split():
        assert 3000 < time.time() - float(moment) < 3600 + 600


MOMENT = datetime(2026, 5, 1, tzinfo=UTC)
SECOND = timedelta(seconds=1)
ONE, TWO = UUID(int=1), UUID(int=2)
HOOK = UUID(int=9)

GOOD = Evidence(
    promises=Promises({"idem.1": 1, "idem.2": 2}, {"idem.1": {ONE}, "idem.2": {TWO}}),
    jobs=[
        JobRow(ONE, "idem.1", "a", "succeeded", 2, 0, 1, 2, 1, ONE, has_webhook=True, ended_at=MOMENT),
        JobRow(TWO, "idem.2", "a", "cancelled", 1, 0, 0, None, None, TWO, has_webhook=False, ended_at=MOMENT),
    ],
    calls=[
        CallRow(ONE, 1, 1, "suspense", "lost_lease", None, 0, 40, MOMENT - 9 * SECOND, MOMENT - 5 * SECOND),
        CallRow(ONE, 2, 1, "answered", None, "req_2", 30, 0, MOMENT - 2 * SECOND, MOMENT),
        CallRow(TWO, 1, 1, "suspense", "cancelled", None, 0, 40, MOMENT - SECOND, MOMENT),
    ],
    attempts=[AttemptRow(ONE, 2, "w2")],
    deliveries=[DeliveryRow(HOOK, ONE, "delivered")],
    booked=[
        Booked("req_1", "idem.1", answered=True, cost=30),
        Booked("req_2", "idem.1", answered=True, cost=30),
    ],
    received=[
        Received("h", ONE, accepted=False, verified=True, at=MOMENT + SECOND),
        Received("h", ONE, accepted=True, verified=True, at=MOMENT + 2 * SECOND),
    ],
    seen=Seen(
        samples=3,
        endings={ONE: Ending(ONE, "succeeded", 2, 2, 1, MOMENT, "aa")},
        holders={(ONE, 1): "w1", (ONE, 2): "w2"},
        runs={(ONE, 1): MOMENT - 9 * SECOND, (ONE, 2): MOMENT - 4 * SECOND},
        recoveries=[Recovery("worker 1", 1, 10.0, 16.0, 0, away=2.0)],
        connections={"worker 1": 20},
        dials={"worker 1": 30},
    ),
    calm=Calm(drained=True, standing="", held=0, accidents=[]),
    logs=[Log("worker 1", 900, 100)],
    leaks=Leaks(5, []),
)


def violated(evidence: Evidence) -> dict[str, list[str]]:
    return {one.invariant: list(one.violations) for one in audit(evidence) if one.violations}


def test_a_good_run_has_no_violations_and_every_check_was_made() -> None:
    assert violated(GOOD) == {}
    assert all(finding.checks > 0 for finding in audit(GOOD))
    assert [finding.invariant for finding in audit(GOOD)] == [f"I{number}" for number in range(1, 12)]


def test_what_no_run_checked_is_not_called_kept() -> None:
    nobody_held_a_job = Recovery("worker 1", 0, 10.0, 10.1, 0)
    verdicts = {
        finding.invariant: finding.verdict
        for finding in audit(replace(GOOD, seen=replace(GOOD.seen, recoveries=[nobody_held_a_job])))
    }
    assert verdicts.pop("I8") is Verdict.NOT_CHECKED
    assert set(verdicts.values()) == {Verdict.KEPT}
    left = replace(nobody_held_a_job, left=1)
    broken = audit(replace(GOOD, seen=replace(GOOD.seen, recoveries=[left])))
    assert [one.invariant for one in broken if one.verdict is Verdict.BROKEN] == ["I8"]


REPORT = Report(
    seed=1,
    minutes=2.0,
    done=["worker-kill", "worker-kill", "drop-worker-redis"],
    not_done=["flushall: the server is away"],
    jobs=2,
    calls=2,
    callbacks=1,
    cost=NanoUSD(30),
    suspense=NanoUSD(80),
    busiest=(100, 30),
    standstill=(1.0, 9.0),
    findings=audit(GOOD),
)


@pytest.mark.parametrize(
    ("report", "gap"),
    [
        (replace(REPORT, done=[], not_done=[]), "no fault was done"),
        (replace(REPORT, done=[]), "no fault was done"),
        (replace(REPORT, not_done=["oom: x", "oom: y"]), "2 faults could not be done, and only 3 were"),
        (replace(REPORT, jobs=0), "no job was accepted"),
    ],
)
def test_a_run_that_did_too_little_is_not_good(
    report: Report, gap: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not report.good
    show(report, Screen())
    assert capsys.readouterr().out.endswith(f"this run proves nothing: {gap}\n")
    assert report.as_json()["good"] is False


def test_a_report_says_what_was_done_and_what_was_not_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert REPORT.good
    unchecked = Finding("I8", "a dead worker's jobs are back", 0, [])
    report = replace(REPORT, findings=[*audit(GOOD)[:7], unchecked])
    show(report, Screen())
    shown = capsys.readouterr().out
    assert "3 faults of 2 kinds, 1 not done" in shown
    assert "not done: flushall: the server is away\n" in shown
    assert [line[:2] for line in shown.splitlines() if line.endswith("not checked")] == ["I8"]
    said = report.as_json()
    assert (said["good"], said["done"], said["not_done"]) == (True, 3, 1)
    assert said["invariants"] == {
        **{f.invariant: {"checks": f.checks, "violations": 0, "verdict": "kept"} for f in audit(GOOD)[:7]},
        "I8": {"checks": 0, "violations": 0, "verdict": "not checked"},
    }


def _job(change: Callable[[JobRow], JobRow]) -> Callable[[Evidence], Evidence]:
    return lambda good: replace(good, jobs=[change(good.jobs[0]), good.jobs[1]])


def _seen(change: Callable[[Seen], Seen]) -> Callable[[Evidence], Evidence]:
    return lambda good: replace(good, seen=change(good.seen))


PLANTED: dict[str, tuple[str, str, Callable[[Evidence], Evidence]]] = {
    "a lost job": ("I1", "does not exist", lambda good: replace(good, jobs=good.jobs[:1])),
    "a job that never ended": (
        "I1",
        "is queued",
        _job(lambda job: replace(job, state="queued", ended_at=None)),
    ),
    "a key that was refused": (
        "I1",
        "was refused",
        lambda good: replace(good, promises=replace(good.promises, refused={"idem.3": "conflict"})),
    ),
    "a key with two jobs": (
        "I2",
        "acked as 2 jobs",
        lambda good: replace(good, promises=replace(good.promises, acked={"idem.1": {ONE, TWO}})),
    ),
    "an ending that changed": ("I2", "changed", _seen(lambda seen: replace(seen, changed=["it changed"]))),
    "an ending that is another one in the end": (
        "I2",
        "and is failed in run 2",
        _job(lambda job: replace(job, state="failed")),
    ),
    "a result without an answer": (
        "I2",
        "without an answer",
        lambda good: replace(good, calls=good.calls[:1]),
    ),
    "two callbacks for one ending": (
        "I2",
        "2 callbacks instead of 1",
        lambda good: replace(good, deliveries=[*good.deliveries, DeliveryRow(TWO, ONE, "delivered")]),
    ),
    "a run with two holders": (
        "I3",
        "w1 and w2",
        _seen(lambda seen: replace(seen, two_holders=["w1 and w2"])),
    ),
    "a result from the future": (
        "I3",
        "has its result from run 3 of 2",
        _job(lambda job: replace(job, result_run=3)),
    ),
    "a call of a stale run": (
        "I3",
        "made a call when run 2 had begun",
        lambda good: replace(
            good, calls=[replace(good.calls[0], opened_at=MOMENT - SECOND), *good.calls[1:]]
        ),
    ),
    "an attempt by somebody else": (
        "I3",
        "which w2 held",
        lambda good: replace(good, attempts=[AttemptRow(ONE, 2, "w1")]),
    ),
    "a bill that is not in the ledger": (
        "I4",
        "not 30 <= 130 <= 70",
        lambda good: replace(good, booked=[*good.booked, Booked("req_3", "idem.1", answered=True, cost=70)]),
    ),
    "a double answer": (
        "I4",
        "was made when an answer had been committed",
        lambda good: replace(
            good,
            calls=[*good.calls, replace(good.calls[1], run=3, opened_at=MOMENT + 2 * SECOND, suspense=0)],
        ),
    ),
    "an answer that nobody gave": (
        "I4",
        "knows nothing of call 2/1",
        lambda good: replace(good, booked=[good.booked[0], replace(good.booked[1], id="req_9")]),
    ),
    "a call for a prompt of nobody's": (
        "I4",
        "nobody asked for",
        lambda good: replace(good, booked=[*good.booked, Booked("req_9", None, answered=True, cost=0)]),
    ),
    "a budget that was exceeded": ("I5", "over", _seen(lambda seen: replace(seen, over_budget=["over"]))),
    "money that is held for ever": (
        "I5",
        "7 nano-USD are held",
        lambda good: replace(good, calm=replace(good.calm, held=7)),
    ),
    "a call without an intent": (
        "I6",
        "3 calls reached the provider, 2 were intended",
        lambda good: replace(good, booked=[*good.booked, Booked("req_3", "idem.1", answered=False, cost=0)]),
    ),
    "calls beyond runs and attempts": (
        "I6",
        "2 calls in 1 runs and 0 attempts",
        lambda good: replace(_job(lambda job: replace(job, run=1, result_run=1))(good), attempts=[]),
    ),
    "a missing callback": ("I7", "never took its callback", lambda good: replace(good, received=[])),
    "a callback before the ending": (
        "I7",
        "before it had ended",
        lambda good: replace(good, received=[replace(good.received[1], at=MOMENT - SECOND)]),
    ),
    "a callback under two ids": (
        "I7",
        "several ids",
        lambda good: replace(good, received=[good.received[0], replace(good.received[1], id="other")]),
    ),
    "a callback with a bad signature": (
        "I7",
        "not signed well",
        lambda good: replace(good, received=[replace(good.received[0], verified=False), good.received[1]]),
    ),
    "jobs that came back late": (
        "I8",
        "came back after 8.0 s",
        _seen(lambda seen: replace(seen, recoveries=[Recovery("worker 1", 3, 10.0, 18.0, 0, away=2.0)])),
    ),
    "jobs that never came back": (
        "I8",
        "2 jobs of worker 1 never came back",
        _seen(lambda seen: replace(seen, recoveries=[Recovery("worker 1", 3, 10.0, 18.0, 2)])),
    ),
    "a run that does not drain": (
        "I9",
        "did not drain: 1 of 2",
        lambda good: replace(good, calm=replace(good.calm, drained=False, standing="1 of 2")),
    ),
    "a process that ended by itself": (
        "I9",
        "ended by itself",
        lambda good: replace(good, calm=replace(good.calm, accidents=["worker 1 ended by itself with 1"])),
    ),
    "a hot loop": (
        "I10",
        "wrote 6000 lines in ten seconds",
        lambda good: replace(good, logs=[Log("w", 6000, 6000)]),
    ),
    "a leak of connections": (
        "I10",
        "connections",
        _seen(lambda seen: replace(seen, connections={"worker 1": MOST_CONNECTIONS + 1})),
    ),
    "a hot loop of connections": (
        "I10",
        "made 5000 connections in ten seconds",
        _seen(lambda seen: replace(seen, dials={"worker 1": 5000})),
    ),
    "a secret in a log": (
        "I11",
        "is in a.log",
        lambda good: replace(good, leaks=Leaks(5, ["it is in a.log"])),
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_the_auditor_reports(name: str) -> None:
    invariant, words, plant = PLANTED[name]
    found = violated(plant(GOOD))
    assert any(re.search(re.escape(words), violation) for violation in found.get(invariant, [])), found
