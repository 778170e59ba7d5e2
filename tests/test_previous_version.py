"""A deploy replaces workers one by one: those of the version before run on the schema of this one."""

import asyncio
import io
import os
import re
import subprocess
import sys
import tarfile
from datetime import timedelta
from pathlib import Path

import pytest
from worker_processes import HEADRACE, worker

from headrace_producer import Headrace
from headrace_shared.dispatch.dispatch import Dispatch
from headrace_shared.job import JobState
from headrace_shared.store import feed
from headrace_shared.store.migrate import Migration, migrations
from headrace_shared.store.pool import Pool
from headrace_shared.testing.jobs import Jobs, eventually
from headrace_shared.testing.simulated_provider import SimulatedProvider

ROOT = Path(__file__).parents[1]
PARTS = ("shared", "producer", "workers")
MIGRATIONS = "shared/headrace_shared/store/migrations"
WHICH = "import headrace_workers, headrace_shared; print(headrace_workers.__path__, headrace_shared.__path__)"
PATIENCE = timedelta(seconds=90)
"""A process must start before."""
BODY = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello"}]}
NARROWS = re.compile(
    r"""\bDROP\s+(?!CONSTRAINT|INDEX|NOT\s+NULL)
      | \bRENAME\b | \bTRUNCATE\b | \bSET\s+NOT\s+NULL\b | \bALTER\s+TYPE\b
      | \bALTER\s+(COLUMN\s+)?\w+\s+(SET\s+DATA\s+)?TYPE\b
      | \bADD\s+COLUMN\s+((?!DEFAULT)[^,;])*NOT\s+NULL(?![^,;]*DEFAULT)""",
    re.IGNORECASE | re.VERBOSE,
)
COMMENT = re.compile(r"--.*")
BODY_OF_FUNCTION = re.compile(r"\$\$.*?\$\$", re.DOTALL)


def git(*arguments: str) -> bytes:
    """What git says here; the test is skipped where it cannot say it."""
    try:
        done = subprocess.run(  # noqa: S603
            ("git", *arguments),  # noqa: S607 - the one that is on the path
            cwd=ROOT,
            capture_output=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"the version before is not at hand here: {error}")
    return done.stdout


def commit_before_the_newest_migration() -> str:
    newest = f"{MIGRATIONS}/{migrations()[-1].name}.sql"
    # A merge counts as the commit that brought it.
    log = ("log", "--first-parent", "-m", "--diff-filter=A", "--format=%H")
    added = git(*log, "--", newest).decode().split()
    # One that is not committed yet: the last commit is the version before.
    before = f"{added[-1]}~1" if added else "HEAD"
    return git("rev-parse", "--verify", f"{before}^{{commit}}").decode().strip()


@pytest.fixture
def previous(tmp_path: Path) -> str:
    """The import path of the version before."""
    archive = git("archive", commit_before_the_newest_migration(), "--", *PARTS)
    with tarfile.open(fileobj=io.BytesIO(archive)) as packed:
        packed.extractall(tmp_path, filter="data")
    assert not (tmp_path / MIGRATIONS / f"{migrations()[-1].name}.sql").exists()
    path = os.pathsep.join(str(tmp_path / part) for part in PARTS)
    where = subprocess.run(  # noqa: S603 - this very interpreter
        (sys.executable, "-c", WHICH), env={**os.environ, "PYTHONPATH": path}, capture_output=True, check=True
    ).stdout.decode()
    assert where.count(str(tmp_path)) == 2, where
    return path


@pytest.mark.usefixtures("environment")
async def test_a_worker_of_the_version_before_runs_the_jobs_of_this_one(
    previous: str, pool: Pool, dispatch: Dispatch, headrace: Headrace, provider: SimulatedProvider
) -> None:
    jobs = Jobs(pool, dispatch)
    async with worker(HEADRACE, environment={"PYTHONPATH": previous}) as process:
        sent = [
            await headrace.enqueue(
                "/v1/chat/completions", BODY, webhook="https://example.com/hook", api_key=key
            )
            for key in [None, "ci"] * 10
        ]
        endings = await jobs.ended([job.id for job in sent], within=PATIENCE)
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 30) == 0
    assert {(ending.job.state, ending.job.attempts) for ending in endings} == {(JobState.SUCCEEDED, 0)}
    assert provider.books.total.requests == len(sent)
    ledger = await jobs.ledger()
    assert ledger
    assert await jobs.spend() == ledger
    assert [len(await jobs.deliveries(job.id)) for job in sent] == [1] * len(sent)


@pytest.mark.usefixtures("environment")
async def test_beside_a_worker_of_the_version_before_no_job_of_a_key_is_lost(
    previous: str, pool: Pool, dispatch: Dispatch, provider: SimulatedProvider
) -> None:
    """It may keep queues elsewhere, and their caps not at all."""
    jobs = Jobs(pool, dispatch)
    async with worker(HEADRACE, environment={"PYTHONPATH": previous}), worker(HEADRACE):
        await eventually(lambda: feed.live_workers(pool), lambda found: len(found) == 2, within=PATIENCE)
        # One that does not know what is configured goes on under what was.
        await jobs.configure({"keys": {"ci": {"concurrent": 2}}})
        ids = [job_id for key in ("ci", "nightly", None) for job_id in await jobs.add(40, api_key=key)]
        endings = await jobs.ended(ids, within=PATIENCE)
    assert {ending.job.state for ending in endings} == {JobState.SUCCEEDED}
    assert provider.books.total.requests == len(ids)
    assert await jobs.spend() == await jobs.ledger()


@pytest.mark.parametrize("migration", migrations()[1:], ids=lambda migration: str(migration.version))
def test_a_migration_only_adds(migration: Migration) -> None:
    """What it takes away, the version before may still ask for. Constraints may be widened."""
    assert narrowing(migration.sql) == []


@pytest.mark.parametrize(
    "statement",
    [
        "DROP TABLE headrace.jobs;",
        "ALTER TABLE headrace.jobs\n    ADD COLUMN a int,\n    DROP COLUMN body;",
        "ALTER TABLE headrace.jobs DROP body;",
        "ALTER TABLE headrace.jobs RENAME COLUMN body TO content;",
        "ALTER TABLE headrace.jobs ALTER COLUMN run TYPE bigint;",
        "ALTER TABLE headrace.jobs ADD COLUMN need text NOT NULL;",
        "ALTER TABLE headrace.jobs ALTER webhook SET NOT NULL;",
        "DROP FUNCTION headrace.now();",
    ],
)
def test_what_a_migration_must_not_say_is_found(statement: str) -> None:
    assert narrowing(f"-- It may say DROP TABLE.\n{statement}") != []


def narrowing(sql: str) -> list[str]:
    """The statements after which older code may miss something, or be refused."""
    plain = BODY_OF_FUNCTION.sub("", COMMENT.sub("", sql))
    return [statement.strip() for statement in plain.split(";") if NARROWS.search(statement)]
