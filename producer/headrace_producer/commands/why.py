"""`headrace why`: what a job waits for, or the next job of a batch."""

import asyncio
from typing import Annotated
from uuid import UUID

import typer

from headrace_producer.commands.options import AsJson
from headrace_producer.connections import Connections, open_connections
from headrace_producer.console import Console, count
from headrace_producer.reasons import parts_of
from headrace_producer.why import explain
from headrace_shared.errors import InvalidInput, InvalidRequest
from headrace_shared.ids import BatchId, JobId
from headrace_shared.settings import load_settings
from headrace_shared.store import batches
from headrace_shared.store.batches import Batch


def why(
    job: Annotated[str, typer.Argument(metavar="JOB", help="Its id, or a batch's for the batch's next job.")],
    *,
    as_json: AsJson = False,
) -> None:
    """Say what a job waits for, with numbers and the time that takes; or who runs it, or how it ended."""
    asyncio.run(_why(Console(as_json), job))


async def _why(console: Console, text: str) -> None:
    try:
        known_id = UUID(text)
    except ValueError:
        raise InvalidRequest(field="JOB", reason=f"{text!r:.64} is not the id of a job") from None
    async with open_connections(load_settings()) as connections:
        batch = await batches.get_batch(connections.pool, BatchId(known_id))
        job_id = await _next_of(console, connections, batch) if batch else JobId(known_id)
        found = await explain(connections.pool, connections.redis, job_id)
    console.say(found.sentence)
    expected = found.expected
    console.conclude(
        {
            "batch_id": str(batch.id) if batch else None,
            "job_id": str(job_id),
            "status": found.state,
            "sentence": found.sentence,
            "expected_seconds": None if expected is None else expected.total_seconds(),
            "reasons": [parts_of(reason) for reason in found.reasons],
            "unknown": found.unknown,
        }
    )


async def _next_of(console: Console, connections: Connections, batch: Batch) -> JobId:
    """Say how a batch stands, and return the first of its jobs that waits, else of those that run.

    Raises:
        InvalidInput: all its jobs have ended.

    """
    job_id = await batches.next_of_batch(connections.pool, batch.id)
    progress = await batches.batch_progress(connections.pool, batch.id)
    if job_id is None:
        raise InvalidInput(
            reason=f"Batch {batch.id} waits for nothing: of {count(batch.total, 'request')} "
            f"{progress.enqueued:,} are enqueued, and all of these have ended (see "
            f"'headrace status {batch.id}')."
        )
    waiting = progress.enqueued - progress.ended - progress.running
    console.say(
        f"Batch {batch.id}: {progress.ended:,} of {batch.total:,} done, {progress.running:,} running, "
        f"{waiting:,} waiting. The next of them:"
    )
    return job_id
