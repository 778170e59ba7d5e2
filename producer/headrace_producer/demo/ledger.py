"""What the demo asks of the store: how far it is, what a worker held, what it came to."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from headrace_shared.money import NanoUSD
from headrace_shared.store.pool import Database

_PROGRESS = """
SELECT j.*, c.*, (SELECT count(*) FROM headrace.attempts WHERE outcome = 'retried') AS retried
FROM (SELECT count(*) AS total,
             count(*) FILTER (WHERE state = 'succeeded') AS succeeded,
             count(*) FILTER (WHERE ended_at IS NOT NULL AND state <> 'succeeded') AS failed,
             count(*) FILTER (WHERE state = 'running') AS running
      FROM headrace.jobs) AS j,
     (SELECT coalesce(sum(prompt_tokens), 0)::bigint AS prompt_tokens,
             coalesce(sum(completion_tokens), 0)::bigint AS completion_tokens,
             coalesce(sum(cost_nano), 0)::bigint AS cost,
             coalesce(sum(suspense_nano), 0)::bigint AS suspense
      FROM headrace.calls) AS c
"""

_WORKERS = "SELECT id FROM headrace.workers"

_OPEN_CALLS = """
SELECT count(*) AS open FROM headrace.calls c JOIN headrace.jobs j ON j.id = c.job_id AND j.run = c.run
WHERE c.state = 'open' AND j.state = 'running' AND j.worker = $1
"""

_HELD = """
SELECT j.id, j.run, c.state IS NOT NULL AS open, coalesce(c.held_nano, 0) AS held
FROM headrace.jobs j
LEFT JOIN headrace.calls c ON c.job_id = j.id AND c.run = j.run AND c.state = 'open'
WHERE j.worker = $1 AND j.state = 'running'
"""

_RETURNED = """
SELECT count(*) AS returned
FROM headrace.jobs j JOIN unnest($1::uuid[], $2::int[]) AS held(id, run) USING (id)
WHERE j.run > held.run OR j.state <> 'running'
"""

_TOTALS = """
SELECT (SELECT count(*) FROM headrace.attempts) AS attempts,
       (SELECT coalesce(sum(crashes), 0)::int FROM headrace.jobs) AS crashes,
       (SELECT count(*) FROM headrace.calls) AS calls,
       (SELECT count(*) FROM headrace.calls WHERE state = 'suspense') AS in_suspense,
       (SELECT count(*) FROM headrace.calls WHERE state = 'open') AS open,
       j.*, c.*
FROM (SELECT percentile_cont(ARRAY[0.5, 0.95]) WITHIN GROUP (ORDER BY ended_at - created_at) AS job_latency,
             max(ended_at) - min(created_at) AS duration
      FROM headrace.jobs WHERE ended_at IS NOT NULL) AS j,
     (SELECT percentile_cont(ARRAY[0.5, 0.95]) WITHIN GROUP (ORDER BY latency) AS call_latency
      FROM headrace.calls WHERE state = 'answered') AS c
"""

_FAILURES = """
SELECT error_class, error, count(*) AS jobs FROM headrace.jobs
WHERE ended_at IS NOT NULL AND state <> 'succeeded' GROUP BY error_class, error ORDER BY jobs DESC LIMIT 3
"""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far all jobs are."""

    total: int
    succeeded: int
    failed: int
    running: int
    retried: int
    """Attempts that failed and were made again."""
    prompt_tokens: int
    completion_tokens: int
    cost: NanoUSD
    suspense: NanoUSD

    @property
    def ended(self) -> int:
        return self.succeeded + self.failed

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Holding:
    """What a worker had in its hands."""

    jobs: Sequence[UUID]
    runs: Sequence[int]
    open_calls: int
    held: NanoUSD
    """The worst case of its open calls."""


@dataclass(frozen=True, slots=True)
class Latency:
    p50: timedelta
    p95: timedelta


@dataclass(frozen=True, slots=True)
class Totals:
    """What the run came to, as the store has it."""

    attempts: int
    crashes: int
    calls: int
    in_suspense: int
    open: int
    duration: timedelta
    jobs: Latency
    """From being enqueued to the end."""
    provider: Latency
    """Of answered calls."""


async def progress(database: Database) -> Progress:
    row = await database.fetchrow(_PROGRESS)
    return Progress(**dict(row.items())) if row else Progress(0, 0, 0, 0, 0, 0, 0, NanoUSD(0), NanoUSD(0))


async def worker_of(database: Database, pid: int) -> str | None:
    """Return the id of the worker that runs as a process of this machine."""
    ids = [str(row["id"]) for row in await database.fetch(_WORKERS)]
    return next((one for one in ids if one.rsplit("-", 2)[1] == str(pid)), None)


async def open_calls(database: Database, worker: str) -> int:
    row = await database.fetchrow(_OPEN_CALLS, worker)
    return int(row["open"]) if row else 0


async def holding(database: Database, worker: str) -> Holding:
    rows = await database.fetch(_HELD, worker)
    return Holding(
        [row["id"] for row in rows],
        [row["run"] for row in rows],
        sum(bool(row["open"]) for row in rows),
        NanoUSD(sum(int(row["held"]) for row in rows)),
    )


async def returned(database: Database, held: Holding) -> int:
    """Count the jobs that are not in the hands of their dead worker any more."""
    row = await database.fetchrow(_RETURNED, held.jobs, held.runs)
    return int(row["returned"]) if row else 0


async def totals(database: Database) -> Totals:
    row = await database.fetchrow(_TOTALS)
    if row is None:
        raise LookupError("the ledger gave no totals")
    return Totals(
        attempts=row["attempts"],
        crashes=row["crashes"],
        calls=row["calls"],
        in_suspense=row["in_suspense"],
        open=row["open"],
        duration=row["duration"] or timedelta(0),
        jobs=_latency(row["job_latency"]),
        provider=_latency(row["call_latency"]),
    )


async def failures(database: Database) -> list[str]:
    """Return why jobs failed, the most frequent reasons first."""
    return [
        f"{row['jobs']} x {row['error_class']}: {row['error']}" for row in await database.fetch(_FAILURES)
    ]


def _latency(percentiles: Sequence[timedelta] | None) -> Latency:
    return Latency(*percentiles) if percentiles else Latency(timedelta(0), timedelta(0))
