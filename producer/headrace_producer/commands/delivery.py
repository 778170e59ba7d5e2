"""What a batch came to, in a sentence, in a JSON object, and in its files."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

from headrace_producer.batch.following import Standing
from headrace_producer.batch.output import replacing, write_results
from headrace_producer.connections import Connections
from headrace_producer.console import Console, count
from headrace_shared.ids import BatchId
from headrace_shared.job import JobState
from headrace_shared.money import format_usd
from headrace_shared.store.batches import BatchCost, LineResult, Progress, batch_results

_FAILURES_SHOWN = 5
_MESSAGE_SHOWN = 200


def ending_of(batch_id: BatchId, total: int, progress: Progress, cost: BatchCost) -> str:
    """Say how far a batch is, or how it ended."""
    suspense = f", {format_usd(cost.suspense)} in suspense" if cost.suspense else ""
    return (
        f"Batch {batch_id}: {progress.succeeded:,} of {total:,} succeeded, {progress.failed:,} failed; "
        f"{cost.prompt_tokens:,} tokens in, {cost.completion_tokens:,} out, "
        f"{format_usd(cost.cost)}{suspense}."
    )


def summary_of(batch_id: BatchId, total: int, standing: Standing) -> dict[str, object]:
    """Return the JSON object that a batch ends with."""
    progress, cost = standing.progress, standing.cost
    return {
        "batch_id": str(batch_id),
        "total": total,
        "enqueued": progress.enqueued,
        "running": progress.running,
        "succeeded": progress.succeeded,
        "failed": progress.failed,
        "retried": progress.retried,
        "prompt_tokens": cost.prompt_tokens,
        "completion_tokens": cost.completion_tokens,
        "cost_nano_usd": cost.cost,
        "suspense_nano_usd": cost.suspense,
    }


async def deliver(
    console: Console, connections: Connections, batch_id: BatchId, output: Path | None, errors: Path | None
) -> None:
    """Write the results of a batch: answers to a file or to standard output, failures to a file.

    Failures that go to no file are named on standard error, the first few of them.
    """
    if console.as_json and output is None and errors is None:
        return
    with replacing(output) as out, replacing(errors) as err:
        async with aclosing(batch_results(connections.pool, batch_id)) as results:
            shown = results if err is not None else _naming_failures(console, results)
            await write_results(shown, console if out is None else out, err)
    for path in (output, errors):
        if path is not None:
            console.note(f"Written: {path}")


async def _naming_failures(
    console: Console, results: AsyncGenerator[LineResult]
) -> AsyncGenerator[LineResult]:
    failed = 0
    async for result in results:
        if result.state is not JobState.SUCCEEDED:
            failed += 1
            if failed <= _FAILURES_SHOWN:
                message = (result.error or "").replace("\n", " ")[:_MESSAGE_SHOWN]
                console.note(f"  line {result.line} ({result.custom_id}) {result.error_class}: {message}")
        yield result
    if failed > _FAILURES_SHOWN:
        console.note(f"  and {count(failed - _FAILURES_SHOWN, 'other failure')}: --errors FILE has them all")
