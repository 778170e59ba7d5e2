"""`headrace submit`: a file of requests becomes a batch."""

import asyncio
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from headrace_producer.batch.expecting import Quote
from headrace_producer.batch.lines import Format, OpenAILines
from headrace_producer.batch.output import check_paths
from headrace_producer.batch.progress import Progressing
from headrace_producer.batch.submit import (
    Interrupted,
    Submission,
    Submitted,
    Submitter,
    check_cost,
    check_webhook,
    quote_file,
)
from headrace_producer.batch.templates import Template
from headrace_producer.checking import check_tenant
from headrace_producer.commands.delivery import deliver, ending_of, summary_of
from headrace_producer.commands.options import (
    AsJson,
    Deadline,
    ErrorsFile,
    OutputFile,
    TenantName,
    read_duration,
    read_moment,
)
from headrace_producer.connections import Connections, open_connections
from headrace_producer.console import Console, count, dollars
from headrace_producer.in_force import Snapshot, read_snapshot
from headrace_producer.timing import check_timing
from headrace_shared.configuration import Configuration
from headrace_shared.errors import InvalidInput, MissingSetting
from headrace_shared.money import NanoUSD, parse_usd
from headrace_shared.prices import PriceBook
from headrace_shared.scopes import check_tags
from headrace_shared.settings import load_settings
from headrace_shared.store import lengths


@dataclass(frozen=True, slots=True)
class _Targets:
    output: Path | None
    errors: Path | None


def submit(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="JSONL in OpenAI's batch format; - is standard input.")
    ],
    *,
    wait: Annotated[bool, typer.Option("--wait", help="Return when every request is done.")] = False,
    output: OutputFile = None,
    errors: ErrorsFile = None,
    max_cost: Annotated[
        str | None, typer.Option(metavar="DOLLARS", help="What the batch may cost; it stops there.")
    ] = None,
    webhook: Annotated[str | None, typer.Option(metavar="URL", help="Called when a job has ended.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check and quote the file.")] = False,
    sample: Annotated[
        int, typer.Option(min=0, metavar="N", help="Run N requests at random, and quote the rest by them.")
    ] = 0,
    again: Annotated[
        bool, typer.Option("--again", help="Run a file anew that was submitted before.")
    ] = False,
    lane: Annotated[str, typer.Option(help="The lane its jobs wait in.")] = "batch",
    tenant: TenantName = "default",
    template: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help='Prompt for each record of a CSV or JSONL: "Sum up: {text}".'),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model of a template's requests.")] = None,
    id_field: Annotated[
        str | None, typer.Option(help="The field of a record that becomes its custom_id.")
    ] = None,
    ttl: Annotated[
        str | None, typer.Option(metavar="DURATION", help="How long a job may wait to be started: 2h.")
    ] = None,
    deadline: Deadline = None,
    timeout: Annotated[
        str | None, typer.Option(metavar="DURATION", help="How long a job may take from its first start.")
    ] = None,
    tag: Annotated[
        list[str] | None,
        typer.Option(metavar="TAG", help="What its cost is counted under; several may be given."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a file of requests: checked as a whole, enqueued once, resumed where it was left."""
    console = Console(as_json)
    check_paths(file, output, errors)
    submission = Submission(
        path=file,
        form=_format(file, template, model, id_field),
        tenant=check_tenant(tenant),
        lane=lane,
        webhook=webhook,
        timing=check_timing(
            None,
            None,
            read_duration("--ttl", ttl),
            read_moment("--deadline", deadline),
            read_duration("--timeout", timeout),
        ),
        max_cost=None if max_cost is None else parse_usd(max_cost),
        tags=check_tags(tag or []),
        sample=sample,
        again=again,
        wait=wait,
    )
    if dry_run:
        asyncio.run(_quote(console, submission))
        return
    raise typer.Exit(asyncio.run(_submit(console, submission, _Targets(output, errors))))


def _format(file: Path, template: str | None, model: str | None, id_field: str | None) -> Format:
    if template is not None:
        if model is None:
            raise InvalidInput(reason="--template needs --model.")
        return Template(template, model=model, id_field=id_field)
    if model is not None or id_field is not None:
        raise InvalidInput(reason="--model and --id-field belong to --template.")
    if file.suffix.lower() in (".csv", ".tsv"):
        raise InvalidInput(
            reason=f'{file} holds plain records: give --template "... {{field}} ..." and --model.'
        )
    return OpenAILines()


async def _quote(console: Console, submission: Submission) -> None:
    quote = await _quoted_here(console, submission)
    _say_quote(console, submission, quote)
    check_cost(submission, quote)
    console.conclude(
        {"batch_id": None, "total": quote.requests, "succeeded": 0, "failed": 0, "cost_nano_usd": 0}
        | {"quote": _quoted(quote)}
    )


async def _quoted_here(console: Console, submission: Submission) -> Quote:
    settings = load_settings()
    check_webhook(submission, settings)
    try:
        async with open_connections(settings) as connections:
            snapshot = await read_snapshot(connections.pool)
            return await quote_file(submission, snapshot, partial(lengths.learnt, connections.pool))
    except MissingSetting:
        console.note("No servers are named or running here: quoted by the built-in configuration.")
        configuration = Configuration.default()
        return await quote_file(submission, Snapshot(0, configuration, PriceBook(configuration)))


def _quoted(quote: Quote) -> dict[str, object]:
    money = ("most", "expected", "p50", "p90", "dearest")
    named = {f"{name}_nano_usd" if name in money else name: value for name, value in asdict(quote).items()}
    return {**named, "unknown": quote.unknown}


def _say_quote(console: Console, submission: Submission, quote: Quote) -> None:
    console.say(f"{submission.path}: {count(quote.requests, 'request')}")
    console.say(
        f"  at most   {dollars(quote.most):>12}   "
        f"{quote.most_input_tokens:,} tokens in, {quote.most_output_tokens:,} out"
    )
    console.say(
        f"  expected  {dollars(quote.expected):>12}   "
        f"{quote.expected_input_tokens:,} tokens in, {quote.expected_output_tokens:,} out"
    )
    console.say(f"  P50       {dollars(quote.p50):>12}   half of all batches like this one cost less")
    console.say(f"  P90       {dollars(quote.p90):>12}   nine in ten cost less")
    console.say(f"  known by  {_knowledge(quote)}")


def _knowledge(quote: Quote) -> str:
    parts = [f"their template {quote.known_by_template:,}", f"their model {quote.known_by_model:,}"]
    if quote.unknown:
        parts.append(f"nothing {quote.unknown:,}, which count at their worst case")
    return ", ".join(parts)


async def _submit(console: Console, submission: Submission, targets: _Targets) -> int:
    async with open_connections(load_settings()) as connections:
        with Progressing() as view:
            try:
                submitted = await Submitter(connections, view).submit(submission)
            except Interrupted as interruption:
                view.tell(_how_to_come_back(interruption))
                raise KeyboardInterrupt from None
        await _report(console, connections, submission, submitted, targets)
    console.conclude(_summary(submission, submitted))
    return 1 if submitted.standing.progress.failed else 0


def _how_to_come_back(interruption: Interrupted) -> str:
    if not interruption.complete:
        return "Interrupted. What is enqueued goes on; the same command enqueues the rest."
    return (
        "Interrupted. The jobs go on; come back with the same command, or with "
        f"'headrace status {interruption.batch_id}'."
    )


async def _report(
    console: Console,
    connections: Connections,
    submission: Submission,
    submitted: Submitted,
    targets: _Targets,
) -> None:
    standing = submitted.standing
    if submission.sample:
        _say_sample(console, submitted)
    elif submitted.finished:
        console.note(ending_of(submitted.batch_id, submitted.total, standing.progress, standing.cost))
    else:
        console.note(
            f"Batch {submitted.batch_id}: {count(submitted.enqueued, 'request')} enqueued of "
            f"{submitted.total:,}, {standing.progress.ended:,} done. Follow it with 'headrace status "
            f"{submitted.batch_id}', or run the same command with --wait."
        )
        console.say(str(submitted.batch_id))
    if submitted.finished or submission.sample:
        await deliver(console, connections, submitted.batch_id, targets.output, targets.errors)
    elif targets.output or targets.errors:
        console.note("Results are written when all is done: run the same command again then, or with --wait.")


def _say_sample(console: Console, submitted: Submitted) -> None:
    standing = submitted.standing
    ran = standing.progress.ended
    left = submitted.total - ran
    console.note(ending_of(submitted.batch_id, ran, standing.progress, standing.cost))
    if not left:
        return
    console.say(
        f"The other {count(left, 'request')} would cost about {dollars(_rest(submitted))} at this rate; "
        f"the same command without --sample runs them."
    )


def _rest(submitted: Submitted) -> NanoUSD:
    """What the requests that have not run would cost if they cost what the others did."""
    ran = submitted.standing.progress.ended
    return NanoUSD(-(-submitted.standing.cost.cost * (submitted.total - ran) // max(ran, 1)))


def _summary(submission: Submission, submitted: Submitted) -> dict[str, object]:
    summary = summary_of(submitted.batch_id, submitted.total, submitted.standing)
    summary["created"] = submitted.created
    if submission.sample:
        summary["rest_expected_nano_usd"] = _rest(submitted)
    return summary
