"""The command `headrace demo`."""

import asyncio
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from headrace_producer.commands.options import AsJson
from headrace_producer.console import Console
from headrace_producer.demo.answering import Answering, choose
from headrace_producer.interrupts import cancel_on_signals

_INTERRUPTED = 130


def demo(
    *,
    provider: Annotated[
        Answering | None, typer.Option(help="Who answers; openai is the default where OPENAI_API_KEY is set.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, max=100_000, help="Default: 1,000, or 8 with a local model.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Agree to what a real provider may cost.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run many jobs end to end, through an outage and the death of a worker, and check what is promised."""
    try:
        code = asyncio.run(_demo(provider, jobs, agreed=yes, console=Console(as_json)))
    except asyncio.CancelledError:
        typer.echo("headrace: stopped; everything that was started has ended", err=True)
        code = _INTERRUPTED
    raise typer.Exit(code)


async def _demo(provider: Answering | None, jobs: int | None, *, agreed: bool, console: Console) -> int:
    answering = choose(provider)
    # Here, so that every other command starts without the parts of the demo.
    from headrace_producer.demo.performance import run  # noqa: PLC0415

    cancel_on_signals()
    with TemporaryDirectory(prefix="headrace-demo-", ignore_cleanup_errors=True) as directory:
        ending = await run(answering, jobs, Path(directory), agreed=agreed, stderr=console.as_json)
    console.conclude(ending.answer)
    return 0 if ending.good else 1
