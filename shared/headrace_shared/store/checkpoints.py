"""What a handler has finished, kept so that the job's next run does not do it again."""

from collections.abc import Mapping
from dataclasses import dataclass

from headrace_shared.ids import JobId, Run
from headrace_shared.store.pool import Database
from headrace_shared.store.sql import Statements

_SQL = Statements("checkpoints.sql")


@dataclass(frozen=True, slots=True)
class Recalled:
    """The answer of an earlier run's call."""

    model: str
    answer: bytes


@dataclass(frozen=True, slots=True)
class Journal:
    """What earlier runs of a job left."""

    steps: Mapping[str, bytes]
    """The JSON of each step, by its name."""
    calls: Mapping[tuple[str, bytes], Recalled]
    """The first answer to each call, by its name and the digest of what it asked."""


EMPTY = Journal({}, {})


async def recall(database: Database, job_id: JobId, run: Run) -> Journal:
    """Read what the runs before this one have finished."""
    steps: dict[str, bytes] = {}
    calls: dict[tuple[str, bytes], Recalled] = {}
    for row in await database.fetch(_SQL["recall"], job_id, run):
        if row["digest"] is None:
            steps[row["name"]] = row["value"]
        else:
            calls.setdefault((row["name"], row["digest"]), Recalled(row["model"], row["value"]))
    return Journal(steps, calls)


async def keep(database: Database, job_id: JobId, run: Run, name: str, value: bytes) -> bool:
    """Write what a step came to; false when the run has lost its row, and nothing was written."""
    row = await database.fetchrow(_SQL["keep"], job_id, run, name, value)
    return row is not None and bool(row["owned"])


async def tell(database: Database, job_id: JobId, run: Run, progress: float, note: str | None) -> None:
    """Write how far a run is, unless it has lost its row."""
    await database.execute(_SQL["tell"], job_id, run, progress, note)
