"""Everything that was found out about a run, for the auditor to judge."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

from headrace_producer.chaos import acks, records
from headrace_producer.chaos.acks import Promises
from headrace_producer.chaos.records import AttemptRow, CallRow, DeliveryRow, JobRow
from headrace_producer.chaos.stage import PROVIDER, Stage
from headrace_producer.chaos.watcher import Seen
from headrace_producer.chaos.work import wish_of
from headrace_shared.prices import PriceBook
from headrace_shared.testing.bill import charge
from headrace_shared.testing.webhook_receiver import Delivery

_SUCCESS = 2
_TEN_SECONDS = 18


@dataclass(frozen=True, slots=True)
class Booked:
    """One request in the provider's own books."""

    id: str
    key: str | None
    """Of the job whose prompt it had; None for a prompt that nobody asked for, or that was not read."""
    answered: bool
    cost: int


@dataclass(frozen=True, slots=True)
class Received:
    """One delivery that reached a receiver."""

    id: str
    job: UUID | None
    accepted: bool
    """Its signature was verified, and it was answered 2xx."""
    verified: bool
    at: datetime


@dataclass(frozen=True, slots=True)
class Log:
    """What one process wrote in its life."""

    name: str
    lines: int
    busiest: int
    """Lines in the ten seconds in which there were most."""


@dataclass(frozen=True, slots=True)
class Calm:
    """What was found after the last fault."""

    drained: bool
    standing: str
    """How far the jobs are, in words."""
    held: int
    """What the counters of budgets still hold, in nano-USD."""
    accidents: Sequence[str]
    """Processes that ended although nobody had ended them."""


@dataclass(frozen=True, slots=True)
class Leaks:
    """What was found where it must not be."""

    checks: int
    found: Sequence[str]


@dataclass(frozen=True, slots=True)
class Evidence:
    promises: Promises
    jobs: Sequence[JobRow]
    calls: Sequence[CallRow]
    attempts: Sequence[AttemptRow]
    deliveries: Sequence[DeliveryRow]
    booked: Sequence[Booked]
    received: Sequence[Received]
    seen: Seen
    calm: Calm
    logs: Sequence[Log]
    leaks: Leaks


async def collect(stage: Stage, seen: Seen, calm: Calm) -> Evidence:
    """Read everything; all processes may still run, but nothing happens any more."""
    promises = acks.read(stage.ack_files)
    async with stage.pool.acquire() as connection:
        jobs = await records.all_jobs(connection, stage.tenants)
        calls = await records.all_calls(connection, stage.tenants)
        attempts = await records.all_attempts(connection, stage.tenants)
        deliveries = await records.all_deliveries(connection, stage.tenants)
    logs = [
        _log(f"{member.name}, process {life.child.pid}", life.child.log.read_text(errors="replace"))
        for member in stage.workers
        for life in member.lives
    ]
    return Evidence(
        promises,
        jobs,
        calls,
        attempts,
        deliveries,
        _booked(stage, promises),
        [_received(one) for receiver in stage.receivers for one in receiver.inner.deliveries],
        seen,
        calm,
        logs,
        await _leaks(stage, seen),
    )


def _booked(stage: Stage, promises: Promises) -> list[Booked]:
    plan, word = stage.plan, stage.canaries.word
    keys: Mapping[str, str] = {
        wish_of(plan.seed, key, stage.tenants, word).prompt_hash: key for key in promises.asked
    }
    prices = PriceBook(stage.configuration)
    return [
        Booked(one.id, keys.get(one.prompt_hash), one.answered, charge(prices, PROVIDER, one))
        for one in stage.provider.books.requests
    ]


def _received(delivery: Delivery) -> Received:
    verified = delivery.rejected is None
    try:
        job = UUID(json.loads(delivery.body)["data"]["id"])
    except (ValueError, KeyError, TypeError):
        job = None
    accepted = verified and delivery.status // 100 == _SUCCESS
    return Received(delivery.id, job, accepted, verified, datetime.fromtimestamp(delivery.at, UTC))


async def _leaks(stage: Stage, seen: Seen) -> Leaks:
    """Search logs, spans, Redis, and all that an own Redis ever wrote to its disk."""
    logs = sorted(stage.directory.glob("*.log"))
    on_disk = sorted((stage.directory / ".headrace" / "valkey").rglob("*.aof"))
    files, found = stage.canaries.in_files([*logs, *on_disk])
    in_spans = {what for body in stage.spans.bodies for what in stage.canaries.in_text(body)}
    in_redis = {*seen.in_redis, *(await stage.canaries.in_redis(stage.redis))}
    found += [f"{what} is in a span" for what in sorted(in_spans)]
    found += [f"a canary is in the Redis key {key}" for key in sorted(in_redis)]
    return Leaks(files + len(stage.spans.bodies) + seen.redis_searches + 1, found)


def _log(name: str, text: str) -> Log:
    lines = text.splitlines()
    moment, counts = "", Counter[str]()
    for line in lines:
        # "2026-05-01 12:34:5": ten seconds have it in common. What a line goes on with has no time.
        moment = line[:_TEN_SECONDS] if line[:1].isdigit() else moment
        counts[moment] += 1
    return Log(name, len(lines), max(counts.values(), default=0))
