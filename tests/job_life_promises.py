"""What holds of jobs, calls and money at every moment of their lives, read from the servers."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import asyncpg
from job_life import CallKey, World

from headrace_shared.dispatch import keys
from headrace_shared.ids import CallNumber, JobId, Run
from headrace_shared.testing.jobs import Jobs

Rows = Mapping[JobId, asyncpg.Record]

_JOBS = """
SELECT j.*, (SELECT count(*) FROM headrace.deliveries d WHERE d.job_id = j.id) AS deliveries
FROM headrace.jobs j
"""
_ENDING = ("state", "ended_at", "result_run", "result_call", "error_class", "run", "attempts")
_HELD_BY_RUN = ("state", "run", "attempts", "worker", "lease_until", "result_run", "ended_at")


@dataclass(frozen=True, slots=True)
class Look:
    """The rows of one moment."""

    jobs: Rows
    calls: Mapping[CallKey, asyncpg.Record]
    spend: Sequence[asyncpg.Record]

    @classmethod
    async def at(cls, world: World) -> "Look":
        jobs = {JobId(row["id"]): row for row in await world.pool.fetch(_JOBS)}
        calls = {
            (JobId(row["job_id"]), Run(row["run"]), CallNumber(row["call"])): row
            for row in await world.pool.fetch("SELECT * FROM headrace.calls ORDER BY job_id, run, call")
        }
        return cls(jobs, calls, await world.pool.fetch("SELECT * FROM headrace.spend ORDER BY 1, 2, 3"))


def same_holder(before: Look, after: Look, job_id: JobId, run: Run) -> None:
    """Only the holder of the present run changes the row."""
    then, now = before.jobs[job_id], after.jobs[job_id]
    if then["run"] != run or then["state"] != "running":
        assert _part(then, _HELD_BY_RUN) == _part(now, _HELD_BY_RUN), f"{job_id} was changed by run {run}"


def accepted(world: World, look: Look) -> None:
    """An acknowledged job is never lost."""
    assert set(world.acked) == set(look.jobs)


def one_ending(before: Look, after: Look) -> None:
    """A job ends once; its run only grows; it is attempted as often as it may be."""
    for job_id, row in after.jobs.items():
        then = before.jobs.get(job_id)
        if then is not None:
            assert row["run"] >= then["run"]
            if then["ended_at"] is not None:
                assert _part(then, _ENDING) == _part(row, _ENDING), f"{job_id} ended twice"
        assert row["attempts"] <= row["max_attempts"]
        # A delivery is written with the ending, never before it, never without it.
        assert row["deliveries"] == int(row["ended_at"] is not None and row["webhook"] is not None)


def one_result(look: Look) -> None:
    """A job that succeeded has one result, and it is an answered call of its own."""
    for job_id, row in look.jobs.items():
        if row["state"] == "succeeded":
            call = look.calls[job_id, Run(row["result_run"]), CallNumber(row["result_call"])]
            assert (call["state"], call["error_class"]) == ("answered", None)
        else:
            assert row["result_run"] is None


def paid_once(before: Look, after: Look) -> None:
    """What was answered stays so, and no call of the job is begun after it."""
    for key, row in before.calls.items():
        if row["state"] == "answered":
            assert row == after.calls[key]
    answered: dict[JobId, asyncpg.Record] = {}
    for key, row in after.calls.items():
        if row["state"] == "answered" and row["error_class"] is None:
            assert answered.setdefault(key[0], row) is row or row["opened_at"] < answered[key[0]]["ended_at"]
    for key, row in after.calls.items():
        if (answer := answered.get(key[0])) is not None:
            assert row["opened_at"] <= answer["ended_at"], f"{key} was begun after an answer"


def asked_with_intent(world: World, look: Look) -> None:
    """No call without an intent, and no answer that the provider did not give."""
    assert set(world.books.asked) <= set(look.calls)
    for key, row in look.calls.items():
        if row["state"] == "answered":
            assert row["cost_nano"] == world.books.asked[key]


async def booked(world: World) -> None:
    """The sums are those of the ledger."""
    jobs = Jobs(world.pool, world.dispatch)
    assert await jobs.ledger() == await jobs.spend()


async def within_limits(world: World, look: Look) -> None:
    """Settled, in suspense and held stay within the limit, in the ledger and in the counters."""
    ledger = _committed(look.calls.values())
    in_force = await _counters_in_force(world)
    counters = await world.redis.hash(keys.SPENT)
    for scope, limit in world.limits.items():
        assert ledger[scope] <= limit
        if in_force:
            assert ledger[scope] <= sum(_counted(counters, scope)) <= limit


async def _counters_in_force(world: World) -> bool:
    money = await world.redis.hash(keys.MONEY)
    epoch = await world.pool.fetchval("SELECT epoch FROM headrace.money")
    return money.get("epoch") == str(epoch) and money.get("run_id") == world.redis.run_id


def _committed(calls: Iterable[asyncpg.Record]) -> Counter[str]:
    sums: Counter[str] = Counter()
    for row in calls:
        held = row["held_nano"] if row["state"] == "open" else 0
        for scope in row["scopes"]:
            sums[scope] += row["cost_nano"] + row["suspense_nano"] + held
    return sums


def _counted(counters: Mapping[str, str], scope: str) -> tuple[int, int, int]:
    settled, suspense, held = (
        int(counters.get(f"{scope}|total|{part}", 0)) for part in ("settled", "suspense", "held")
    )
    return settled, suspense, held


def _part(row: asyncpg.Record, columns: Sequence[str]) -> list[object]:
    return [row[column] for column in columns]


async def everything(world: World, before: Look, after: Look) -> None:
    """Check all that holds after every step."""
    accepted(world, after)
    one_ending(before, after)
    one_result(after)
    paid_once(before, after)
    asked_with_intent(world, after)
    if (before.calls, before.spend) != (after.calls, after.spend):
        await booked(world)
    await within_limits(world, after)


async def in_the_end(world: World, look: Look) -> None:
    """Check what holds once everything has ended and nothing is under way."""
    assert {row["state"] for row in look.jobs.values()} <= {"succeeded", "failed", "cancelled"}
    assert {row["state"] for row in look.calls.values()} <= {"answered", "failed", "suspense"}
    for key, bill in world.books.asked.items():
        row = look.calls[key]
        assert bill <= row["cost_nano"] + row["suspense_nano"], f"{key} was billed and is not in the ledger"
    ledger = _committed(look.calls.values())
    counters = await world.redis.hash(keys.SPENT)
    for scope in world.limits:
        settled, suspense, held = _counted(counters, scope)
        assert (settled + suspense, held) == (ledger[scope], 0)
