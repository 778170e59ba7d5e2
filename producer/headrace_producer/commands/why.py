"""`headrace why`: what a job waits for."""

import asyncio
from typing import Annotated
from uuid import UUID

import typer

from headrace_producer.commands.options import AsJson
from headrace_producer.connections import open_connections
from headrace_producer.console import Console
from headrace_producer.reasons import parts_of
from headrace_producer.why import explain
from headrace_shared.errors import InvalidRequest
from headrace_shared.ids import JobId
from headrace_shared.settings import load_settings


def why(
    job: Annotated[str, typer.Argument(metavar="JOB", help="Its id.")], *, as_json: AsJson = False
) -> None:
    """Say what a job waits for, with numbers and the time that takes; or who runs it, or how it ended."""
    asyncio.run(_why(Console(as_json), job))


async def _why(console: Console, text: str) -> None:
    try:
        job_id = JobId(UUID(text))
    except ValueError:
        raise InvalidRequest(field="JOB", reason=f"{text!r:.64} is not the id of a job") from None
    async with open_connections(load_settings()) as connections:
        found = await explain(connections.pool, connections.redis, job_id)
    console.say(found.sentence)
    expected = found.expected
    console.conclude(
        {
            "job_id": str(job_id),
            "status": found.state,
            "sentence": found.sentence,
            "expected_seconds": None if expected is None else expected.total_seconds(),
            "reasons": [parts_of(reason) for reason in found.reasons],
            "unknown": found.unknown,
        }
    )
