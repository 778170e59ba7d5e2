"""`headrace settle`: an operator says what calls in suspense came to."""

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated
from uuid import UUID

import typer

from headrace_producer.batch.progress import Progressing, View
from headrace_producer.checking import check_tenant
from headrace_producer.commands.options import AsJson, read_duration
from headrace_producer.connections import Connections, open_connections
from headrace_producer.console import Console, count
from headrace_shared.budgets import Budgets
from headrace_shared.errors import InvalidInput
from headrace_shared.ids import CallNumber, JobId, Run
from headrace_shared.money import ZERO, NanoUSD, format_usd, parse_usd
from headrace_shared.settings import load_settings
from headrace_shared.store.suspense import PAGE, CallName, Decision, Meant, Settled, settle_suspense

MAX_NOTE_LENGTH = 200

_CALL = re.compile(r"(?P<job>[0-9A-Fa-f-]{32,36})(:(?P<run>[1-9]\d{0,8}):(?P<call>[1-9]\d{0,8}))?")
_SHOWN = 20


def settle(
    calls: Annotated[
        list[str] | None,
        typer.Argument(metavar="CALL", help="JOB:RUN:CALL of 'headrace usage --suspense', or JOB."),
    ] = None,
    *,
    all_calls: Annotated[bool, typer.Option("--all", help="Every call in suspense.")] = False,
    older_than: Annotated[
        str | None, typer.Option(metavar="DURATION", help="With --all: in suspense for so long: 1h.")
    ] = None,
    tenant: Annotated[str | None, typer.Option(help="With --all: only this tenant's.")] = None,
    billed: Annotated[bool, typer.Option("--billed", help="Each cost as much as it can have.")] = False,
    free: Annotated[bool, typer.Option("--free", help="None was billed.")] = False,
    cost: Annotated[
        str | None, typer.Option(metavar="DOLLARS", help="What the provider billed for a single call.")
    ] = None,
    note: Annotated[str | None, typer.Option(metavar="TEXT", help="Kept with the decision.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what calls cost of which nobody knows whether they were billed."""
    meant = _meant(calls or (), older_than, tenant, all_calls=all_calls)
    decision = Decision(_cost(cost, billed=billed, free=free), _operator(note))
    asyncio.run(_settle(Console(as_json), meant, decision, single=cost is not None))


def _meant(names: Sequence[str], older_than: str | None, tenant: str | None, *, all_calls: bool) -> Meant:
    if bool(names) == all_calls:
        raise InvalidInput(reason="Name the calls, as JOB:RUN:CALL or as JOB, or give --all.")
    if names and (older_than is not None or tenant is not None):
        raise InvalidInput(reason="--older-than and --tenant belong to --all.")
    least = read_duration("--older-than", older_than)
    return Meant(
        named=tuple(_name(text) for text in names) or None,
        older_than=Meant().older_than if least is None else least,
        tenant=None if tenant is None else check_tenant(tenant),
    )


def _name(text: str) -> CallName:
    read = _CALL.fullmatch(text)
    try:
        job_id = JobId(UUID(read["job"] if read else ""))
    except ValueError:
        raise InvalidInput(reason=f"{text!r:.80} is neither JOB:RUN:CALL nor the id of a job.") from None
    if read is None or read["run"] is None:
        return CallName(job_id)
    return CallName(job_id, (Run(int(read["run"])), CallNumber(int(read["call"]))))


def _cost(cost: str | None, *, billed: bool, free: bool) -> NanoUSD | None:
    if billed + free + (cost is not None) != 1:
        raise InvalidInput(reason="Decide for one of --billed, --free and --cost DOLLARS.")
    if cost is not None:
        return parse_usd(cost)
    return ZERO if free else None


def _operator(note: str | None) -> str:
    if note is None:
        return "operator"
    if not note.isprintable() or not 1 <= len(note) <= MAX_NOTE_LENGTH:
        raise InvalidInput(reason=f"--note: must be 1 to {MAX_NOTE_LENGTH} printable characters.")
    return f"operator: {note}"


async def _settle(console: Console, meant: Meant, decision: Decision, *, single: bool) -> None:
    async with open_connections(load_settings()) as connections:
        with Progressing() as view:
            settled = await _Work(connections, meant, decision, view).do(single=single)
        if settled:
            await Budgets(connections.pool, connections.redis).take_effect("global")
    _report(console, settled)


@dataclass(frozen=True, slots=True)
class _Work:
    connections: Connections
    meant: Meant
    decision: Decision
    view: View

    async def do(self, *, single: bool) -> list[Settled]:
        """Return what was settled: all that is named or nothing; what is not named, a page at a time."""
        if single or self.meant.named is not None:
            async with self.connections.pool.acquire() as connection, connection.transaction():
                settled = await settle_suspense(connection, self.meant, self.decision, limit=2**31 - 1)
                _check_named(self.meant.named or (), settled)
                if single:
                    _check_single(settled)
            return settled
        paged: list[Settled] = []
        while page := await settle_suspense(self.connections.pool, self.meant, self.decision):
            paged += page
            if len(paged) > PAGE:
                self.view.tell(f"{len(paged):,} settled")
        return paged


def _check_named(named: Sequence[CallName], settled: Sequence[Settled]) -> None:
    for name in named:
        if not any(one.job_id == name.job_id and name.call in (None, (one.run, one.call)) for one in settled):
            what = f"{name.job_id}:{name.call[0]}:{name.call[1]}" if name.call else str(name.job_id)
            raise InvalidInput(reason=f"Nothing of {what} is in suspense; nothing was settled.")


def _check_single(settled: Sequence[Settled]) -> None:
    if len(settled) != 1:
        found = count(len(settled), "call")
        raise InvalidInput(reason=f"--cost is that of one call, and {found} would be settled: name it.")
    if settled[0].cost > settled[0].suspense:
        most = format_usd(settled[0].suspense)
        raise InvalidInput(reason=f"--cost: this call cannot have cost more than {most}.")


def _report(console: Console, settled: Sequence[Settled]) -> None:
    suspense = NanoUSD(sum(one.suspense for one in settled))
    cost = NanoUSD(sum(one.cost for one in settled))
    if settled:
        console.table(("call", "tenant", "in suspense", "cost"), [_cells(one) for one in settled[:_SHOWN]])
    console.say(
        f"{count(len(settled), 'call')} settled: {format_usd(suspense)} in suspense became "
        f"{format_usd(cost)} of cost."
    )
    console.conclude(
        {"settled": len(settled), "suspense_nano_usd": suspense, "cost_nano_usd": cost}
        | {"calls": [_as_json(one) for one in settled[:_SHOWN]]}
    )


def _cells(one: Settled) -> list[str]:
    return [
        f"{one.job_id}:{one.run}:{one.call}",
        one.tenant,
        format_usd(one.suspense),
        format_usd(one.cost),
    ]


def _as_json(one: Settled) -> dict[str, object]:
    return {
        "job_id": str(one.job_id),
        "run": one.run,
        "call": one.call,
        "tenant": one.tenant,
        "suspense_nano_usd": one.suspense,
        "cost_nano_usd": one.cost,
    }
