"""A batch is its content and its tenant: whatever interrupts it, each line becomes one job."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from command_line import Command

from headrace_producer.batch.lines import OpenAILines
from headrace_producer.batch.progress import Lines
from headrace_producer.batch.submit import Submission, Submitted, Submitter
from headrace_producer.batch.templates import Template
from headrace_producer.connections import Connections, open_connections
from headrace_shared.dispatch.dispatch import Dispatch
from headrace_shared.errors import InvalidInput
from headrace_shared.ids import Lane, RouteName, Tenant
from headrace_shared.job import Queue
from headrace_shared.money import NanoUSD
from headrace_shared.settings import Settings
from headrace_shared.store.pool import Pool
from headrace_shared.testing.clock import Clock
from headrace_shared.testing.endings import End, Endings
from headrace_shared.testing.jobs import eventually
from headrace_shared.testing.simulated_provider import SimulatedProvider
from headrace_workers.testing import running_worker

TENANT = Tenant("acme")
COMMAND = (sys.executable, "-m", "headrace_producer", "submit")


@pytest.fixture
async def connections(environment: None) -> AsyncIterator[Connections]:
    async with open_connections(Settings()) as connections:
        yield connections


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "requests.jsonl"
    write(path, 10)
    return path


def write(path: Path, count: int) -> None:
    body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello"}]}
    rows = [
        {"custom_id": f"row-{n}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        for n in range(1, count + 1)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


async def submit(connections: Connections, submission: Submission) -> Submitted:
    return await Submitter(connections, Lines()).submit(submission)


def of(path: Path, tenant: Tenant = TENANT) -> Submission:
    return Submission(path, OpenAILines(), tenant)


async def jobs(pool: Pool) -> list[tuple[int, str]]:
    rows = await pool.fetch("SELECT line, custom_id FROM headrace.jobs ORDER BY line")
    return [(row["line"], row["custom_id"]) for row in rows]


def every(count: int) -> list[tuple[int, str]]:
    return [(number, f"row-{number}") for number in range(1, count + 1)]


async def test_the_same_file_again_enqueues_nothing(connections: Connections, path: Path) -> None:
    first = await submit(connections, of(path))
    second = await submit(connections, of(path))
    assert (first.created, first.enqueued, second.created, second.enqueued) == (True, 10, False, 0)
    assert first.batch_id == second.batch_id
    assert await jobs(connections.pool) == every(10)


async def test_a_limit_that_comes_too_late_is_refused(connections: Connections, path: Path) -> None:
    await submit(connections, of(path))
    late = replace(of(path), max_cost=NanoUSD(5 * 10**9 + 1))
    with pytest.raises(InvalidInput, match=r"without --max-cost: .*set batch:\S+ --limit 5\.000000001'"):
        await submit(connections, late)
    limited = await submit(connections, replace(late, again=True))
    assert limited.created
    assert (await submit(connections, late)).batch_id == limited.batch_id


async def test_its_jobs_wait_in_the_queue_of_their_lane(connections: Connections, path: Path) -> None:
    await submit(connections, of(path))
    queue = Queue(Lane("batch"), RouteName("gpt-4o-mini"), TENANT)
    assert await Dispatch(connections.redis).due([queue]) == [10]


async def test_two_at_once_enqueue_each_line_once(connections: Connections, path: Path) -> None:
    both = await asyncio.gather(submit(connections, of(path)), submit(connections, of(path)))
    assert both[0].batch_id == both[1].batch_id
    assert sum(one.enqueued for one in both) == 10
    assert sorted(one.created for one in both) == [False, True]
    assert await jobs(connections.pool) == every(10)


async def test_another_tenant_another_content_or_again_is_another_batch(
    connections: Connections, path: Path
) -> None:
    batches = {(await submit(connections, of(path))).batch_id}
    batches.add((await submit(connections, of(path, Tenant("other")))).batch_id)
    again = await submit(connections, replace(of(path), again=True))
    batches.add(again.batch_id)
    assert (await submit(connections, of(path))).batch_id == again.batch_id
    write(path, 9)
    batches.add((await submit(connections, of(path))).batch_id)
    assert len(batches) == 4
    assert len(await jobs(connections.pool)) == 39


async def test_another_template_is_another_batch(connections: Connections, tmp_path: Path) -> None:
    path = tmp_path / "records.csv"
    path.write_text("text\na\nb\n")
    forms = [Template(text, model="gpt-4o-mini") for text in ("One: {text}", "Two: {text}")]
    batches = {
        (await submit(connections, Submission(path, form, TENANT))).batch_id for form in (*forms, *forms)
    }
    assert len(batches) == 2
    assert len(await jobs(connections.pool)) == 4


async def test_the_rest_of_a_batch_has_the_tags_of_its_beginning(
    connections: Connections, path: Path
) -> None:
    sampling = asyncio.create_task(submit(connections, replace(of(path), tags=("a", "b"), sample=3)))
    await eventually(lambda: jobs(connections.pool), lambda found: len(found) == 3)
    with pytest.raises(InvalidInput, match=r"enqueued already, with --tag a, --tag b: .*--again"):
        await submit(connections, replace(of(path), tags=("a",)))
    assert len(await jobs(connections.pool)) == 3
    assert (await submit(connections, of(path))).enqueued == 7
    assert await connections.pool.fetchval("SELECT DISTINCT tags FROM headrace.jobs") == ["a", "b"]
    assert (await submit(connections, replace(of(path), tags=("a", "b")))).enqueued == 0
    sampling.cancel()
    await asyncio.gather(sampling, return_exceptions=True)


async def test_tags_that_come_too_late_are_refused(connections: Connections, path: Path) -> None:
    first = await submit(connections, of(path))
    late = replace(of(path), tags=("nightly",))
    with pytest.raises(InvalidInput, match="enqueued already, without --tag: "):
        await submit(connections, late)
    assert (await submit(connections, replace(late, again=True))).batch_id != first.batch_id
    assert (await submit(connections, late)).enqueued == 0


async def test_a_sample_larger_than_the_file_says_that_it_is_all_of_it(
    environment: None, command: Command, provider: SimulatedProvider
) -> None:
    async with running_worker():
        done = await command.submit(2, "--sample", "5")
    assert done.code == 0
    assert "has only 2 requests: --sample 5 takes all of them." in done.err
    assert "The other" not in done.out
    assert provider.books.total.answered == 2


async def test_a_sample_runs_first_and_the_rest_joins_it(connections: Connections, path: Path) -> None:
    sampling = asyncio.create_task(submit(connections, replace(of(path), sample=3)))
    chosen = await eventually(lambda: jobs(connections.pool), lambda found: len(found) == 3)
    batch_id = await connections.pool.fetchval("SELECT id FROM headrace.batches")
    await Endings(connections.pool).end_batch(batch_id, lambda _: End.answered(b"{}"))
    sampled = await sampling
    assert (sampled.total, sampled.standing.progress.ended, sampled.finished) == (10, 3, False)
    rest = await submit(connections, of(path))
    assert (rest.batch_id, rest.enqueued) == (sampled.batch_id, 7)
    assert await jobs(connections.pool) == every(10)
    assert chosen != every(3)


async def test_a_batch_whose_results_were_dropped_is_not_paid_for_again_unasked(
    connections: Connections, path: Path, clock: Clock
) -> None:
    await submit(connections, of(path))
    await connections.pool.execute("DELETE FROM headrace.jobs")
    await connections.pool.execute(
        "UPDATE headrace.batches SET created_at = created_at - $1::interval", timedelta(days=31)
    )
    with pytest.raises(InvalidInput, match="no longer kept: --again"):
        await submit(connections, of(path))
    assert (await submit(connections, replace(of(path), again=True))).enqueued == 10


async def start(path: Path, *options: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *COMMAND, str(path), "--tenant", TENANT, *options, env=os.environ, stderr=asyncio.subprocess.PIPE
    )


async def read_until(process: asyncio.subprocess.Process, beginning: bytes) -> None:
    assert process.stderr is not None
    async for line in process.stderr:
        if line.startswith(beginning):
            return
    pytest.fail("the process ended before it said so")


async def test_killed_half_way_through_it_resumes(connections: Connections, tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    write(path, 8000)
    process = await start(path)
    await read_until(process, b"Enqueued 1,000/8,000")
    process.kill()
    await process.communicate()
    enqueued = len(await jobs(connections.pool))
    assert 1000 <= enqueued < 8000
    resumed = await submit(connections, of(path))
    assert (resumed.created, resumed.enqueued) == (False, 8000 - enqueued)
    assert await jobs(connections.pool) == every(8000)


async def test_interrupted_while_it_waits_its_jobs_go_on(connections: Connections, path: Path) -> None:
    process = await start(path, "--wait")
    await read_until(process, b"Done 0/10")
    process.send_signal(signal.SIGINT)
    _, said = await process.communicate()
    assert process.returncode == 130
    assert b"come back with the same command" in said
    assert b"Traceback" not in said
    states = await connections.pool.fetch("SELECT DISTINCT state FROM headrace.jobs")
    assert [row["state"] for row in states] == ["queued"]
