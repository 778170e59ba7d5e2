"""`headrace status`, `result` and `cancel`: of one job, or of a batch."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from uuid import UUID

import typer

from headrace_producer.batch.following import standing
from headrace_producer.batch.output import replacing
from headrace_producer.commands.delivery import deliver, ending_of, summary_of
from headrace_producer.commands.options import AsJson, ErrorsFile, OutputFile
from headrace_producer.commands.tried import tried_lines, tried_row
from headrace_producer.connections import Connections, open_connections
from headrace_producer.console import Console, count, in_words
from headrace_producer.results import result_of
from headrace_shared.dispatch.dispatch import Entry
from headrace_shared.errors import InvalidInput, InvalidRequest, JobFailed
from headrace_shared.handlers import handler_of, public_lane
from headrace_shared.ids import BatchId, JobId
from headrace_shared.job import Ending, Job, JobState
from headrace_shared.money import format_usd
from headrace_shared.settings import load_settings
from headrace_shared.store import batches, jobs
from headrace_shared.store.batches import Batch

AnyId = Annotated[str, typer.Argument(metavar="ID", help="Of a job, or of a batch.")]


def status(known_id: AnyId, *, as_json: AsJson = False) -> None:
    """Say how a job or a batch stands."""
    asyncio.run(_status(Console(as_json), known_id))


def result(
    known_id: AnyId,
    *,
    output: OutputFile = None,
    errors: ErrorsFile = None,
    as_json: AsJson = False,
) -> None:
    """Write the answer of a job, or those of a batch that are there."""
    raise typer.Exit(asyncio.run(_result(Console(as_json), known_id, output, errors)))


def cancel(known_id: AnyId, *, as_json: AsJson = False) -> None:
    """Cancel a job or a batch; what has ended stays as it is."""
    asyncio.run(_cancel(Console(as_json), known_id))


@dataclass(frozen=True, slots=True)
class _Found:
    connections: Connections
    thing: Batch | Ending


@asynccontextmanager
async def _find(text: str) -> AsyncGenerator[_Found]:
    try:
        known_id = UUID(text)
    except ValueError:
        raise InvalidRequest(field="ID", reason=f"{text!r:.64} is not the id of a job or a batch") from None
    async with open_connections(load_settings()) as connections:
        batch = await batches.get_batch(connections.pool, BatchId(known_id))
        ending = None if batch else await jobs.get_ending(connections.pool, JobId(known_id))
        thing = batch or ending
        if thing is None:
            raise InvalidInput(reason=f"There is no job and no batch {known_id}.")
        yield _Found(connections, thing)


async def _status(console: Console, text: str) -> None:
    async with _find(text) as found:
        match found.thing:
            case Batch() as batch:
                now = await standing(found.connections, batch.id, batch.total)
                console.say(ending_of(batch.id, batch.total, now.progress, now.cost))
                waiting = now.progress.enqueued - now.progress.ended - now.progress.running
                if not now.finished:
                    console.say(f"  {now.progress.running:,} running, {waiting:,} waiting")
                if now.progress.enqueued < batch.total:
                    console.say(
                        f"  {batch.total - now.progress.enqueued:,} not enqueued: submit {batch.name} again"
                    )
                console.conclude(summary_of(batch.id, batch.total, now))
            case Ending() as ending:
                tried = await jobs.list_attempts(found.connections.pool, ending.job.id)
                for line in [*_lines_of(ending), *tried_lines(tried)]:
                    console.say(line)
                console.conclude(_job_summary(ending) | {"tried": [tried_row(one) for one in tried]})


def _lines_of(ending: Ending) -> list[str]:
    job, bill = ending.job, ending.bill
    waiting = f", waits for {job.waiting_for}" if job.waiting_for else ""
    tokens = f"{bill.usage.prompt_tokens:,} tokens in, {bill.usage.completion_tokens:,} out"
    attempts = f"{count(job.attempts, 'failed attempt')} of at most {job.max_attempts}"
    lines = [
        f"Job {job.id}: {job.state}{waiting}",
        f"  {_work_of(job)}, tenant {job.tenant}, lane {public_lane(job.lane)}",
        f"  {attempts}, {tokens}, {format_usd(bill.cost)}",
    ]
    if job.progress is not None and not job.state.ended:
        note = f": {job.progress_note}" if job.progress_note else ""
        lines.append(f"  {job.progress:.0%} done{note}")
    if bill.suspense:
        lines.append(f"  {format_usd(bill.suspense)} in suspense")
    if job.error:
        lines.append(f"  {job.error_class}: {job.error}")
    if ending.answered_by:
        lines.append(f"  answered by the call of job {ending.answered_by}, which bears its cost")
    return [*lines, *_times_of(job), *_kin_of(job)]


def _times_of(job: Job) -> list[str]:
    limits = [("started by", job.start_by), ("ended by", job.end_by)]
    known = [f"must be {what} {moment:%Y-%m-%d %H:%M:%S %Z}" for what, moment in limits if moment]
    if job.timeout and not job.started_at:
        known.append(f"may take {in_words(job.timeout)}")
    return [f"  {', '.join(known)}"] if known and not job.state.ended else []


def _kin_of(job: Job) -> list[str]:
    kin = [("a retry of", job.replaces), ("replaced by", job.replaced_by)]
    return [f"  {how} {other}" for how, other in kin if other]


def _work_of(job: Job) -> str:
    name = handler_of(job.endpoint)
    return f"{job.endpoint} of {job.route}" if name is None else f"handler {name}"


def _job_summary(ending: Ending) -> dict[str, object]:
    job, bill = ending.job, ending.bill
    return {
        "job_id": str(job.id),
        "status": job.state,
        "tenant": job.tenant,
        "lane": public_lane(job.lane),
        "endpoint": job.endpoint,
        "model": job.route,
        "attempts": job.attempts,
        "waiting_for": job.waiting_for,
        "progress": job.progress,
        "progress_note": job.progress_note,
        "error": None if job.error is None else {"class": job.error_class, "message": job.error},
        "created_at": job.created_at.isoformat(),
        "run_at": job.run_at.isoformat(),
        "start_by": job.start_by.isoformat() if job.start_by else None,
        "end_by": job.end_by.isoformat() if job.end_by else None,
        "timeout_seconds": job.timeout.total_seconds() if job.timeout else None,
        "ended_at": job.ended_at.isoformat() if job.ended_at else None,
        "answered_by": str(ending.answered_by) if ending.answered_by else None,
        "replaces": str(job.replaces) if job.replaces else None,
        "replaced_by": str(job.replaced_by) if job.replaced_by else None,
        "batch_id": str(job.batch_id) if job.batch_id else None,
        "custom_id": job.custom_id,
        "prompt_tokens": bill.usage.prompt_tokens,
        "completion_tokens": bill.usage.completion_tokens,
        "cost_nano_usd": bill.cost,
        "suspense_nano_usd": bill.suspense,
    }


async def _result(console: Console, text: str, output: Path | None, errors: Path | None) -> int:
    async with _find(text) as found:
        match found.thing:
            case Batch() as batch:
                now = await standing(found.connections, batch.id, batch.total)
                console.note(ending_of(batch.id, batch.total, now.progress, now.cost))
                await deliver(console, found.connections, batch.id, output, errors)
                console.conclude(summary_of(batch.id, batch.total, now))
                return 1 if now.progress.failed else 0
            case Ending() as ending:
                return _job_result(console, ending, output)


def _job_result(console: Console, ending: Ending, output: Path | None) -> int:
    if not ending.job.state.ended:
        console.note(f"Job {ending.job.id} has not ended: it is {ending.job.state}.")
        console.conclude(_job_summary(ending))
        return 1
    try:
        found = result_of(ending)
    except JobFailed as error:
        console.note(error.message)
        console.conclude(_job_summary(ending))
        return 1
    if output is None:
        console.write(found.raw + b"\n")
    else:
        with replacing(output) as stream:
            if stream is not None:
                stream.write(found.raw)
    console.conclude(_job_summary(ending) | {"response": found.body})
    return 0


async def _cancel(console: Console, text: str) -> None:
    async with _find(text) as found:
        match found.thing:
            case Batch() as batch:
                cancelled, running = await _cancel_batch(found.connections, batch.id)
                console.say(
                    f"Batch {batch.id}: {count(cancelled, 'job')} cancelled, "
                    f"{count(running, 'running one')} told to stop."
                )
                console.conclude({"batch_id": str(batch.id), "cancelled": cancelled, "stopping": running})
            case Ending(job):
                changed = await _cancel_job(found.connections, job)
                console.say(f"Job {job.id}: {'cancelled' if changed else f'it had ended ({job.state})'}.")
                console.conclude({"job_id": str(job.id), "cancelled": changed})


async def _cancel_batch(connections: Connections, batch_id: BatchId) -> tuple[int, int]:
    cancelled = running = 0
    async with aclosing(batches.cancel_batch(connections.pool, batch_id)) as pages:
        async for page in pages:
            ended = [Entry(job.queue, job.id) for job in page if job.state is JobState.CANCELLED]
            await connections.announcer.ended(ended)
            cancelled += len(ended)
            running += len(page) - len(ended)
    return cancelled, running


async def _cancel_job(connections: Connections, job: Job) -> bool:
    cancellation = await jobs.cancel_job(connections.pool, job.id)
    if cancellation is None:
        return False
    if cancellation.changed and cancellation.state is JobState.CANCELLED:
        await connections.announcer.ended([Entry(cancellation.queue, job.id)])
    return cancellation.changed
