"""`headrace usage`: the ledger, summed."""

import asyncio
from collections.abc import Sequence
from typing import Annotated

import typer

from headrace_producer.checking import check_tenant
from headrace_producer.commands.options import AsJson
from headrace_producer.connections import open_connections
from headrace_producer.console import Console
from headrace_shared.errors import InvalidInput
from headrace_shared.ids import Tenant
from headrace_shared.money import NanoUSD, format_usd
from headrace_shared.settings import load_settings
from headrace_shared.store import money
from headrace_shared.store.money import UsageRow
from headrace_shared.store.suspense import SuspenseRow, list_suspense
from headrace_shared.usage import NO_USAGE

GROUPINGS = ("model", "provider", "tenant", "endpoint")

_NOTHING = UsageRow(None, None, None, None, 0, 0, NO_USAGE, NanoUSD(0), NanoUSD(0))


def usage(
    *,
    by: Annotated[str, typer.Option(metavar="GROUPS", help=f"Any of {','.join(GROUPINGS)}.")] = "",
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    suspense: Annotated[
        bool, typer.Option("--suspense", help="List the calls that may have been billed or not.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Sum up every call that was concluded: tokens, cost, and what is in suspense."""
    groups = [group.strip() for group in by.split(",") if group.strip()]
    for group in groups:
        if group not in GROUPINGS:
            raise InvalidInput(reason=f"--by: {group!r} is not one of {', '.join(GROUPINGS)}.")
    of = None if tenant is None else check_tenant(tenant)
    asyncio.run(_usage(Console(as_json), groups, of, with_suspense=suspense))


async def _usage(
    console: Console, groups: Sequence[str], tenant: Tenant | None, *, with_suspense: bool
) -> None:
    async with open_connections(load_settings()) as connections:
        rows = await money.usage(connections.pool, by=groups, tenant=tenant)
        suspended = await list_suspense(connections.pool, tenant=tenant) if with_suspense else []
    total = _sum(rows)
    names = ("calls", "tokens in", "tokens out", "cost", "in suspense")
    shown = [*rows, total] if groups and rows else [total]
    console.table((*groups, *names), [_cells(row, groups, last=row is total) for row in shown])
    if suspended:
        console.say("")
        console.table(
            ("call", "tenant", "model", "since", "reason", "at most"),
            [_suspense_cells(row) for row in suspended],
        )
    answer = _as_json(total)
    if groups:
        answer["groups"] = [{group: _group(row, group) for group in groups} | _as_json(row) for row in rows]
    if with_suspense:
        answer["suspense"] = [_suspense_json(row) for row in suspended]
    console.conclude(answer)


def _sum(rows: Sequence[UsageRow]) -> UsageRow:
    total = _NOTHING
    for row in rows:
        total = UsageRow(
            None,
            None,
            None,
            None,
            total.calls + row.calls,
            total.answered + row.answered,
            total.usage + row.usage,
            NanoUSD(total.cost + row.cost),
            NanoUSD(total.suspense + row.suspense),
        )
    return total


def _group(row: UsageRow, group: str) -> str | None:
    return {"model": row.model, "provider": row.provider, "tenant": row.tenant, "endpoint": row.endpoint}[
        group
    ]


def _cells(row: UsageRow, groups: Sequence[str], *, last: bool) -> list[str]:
    heads = ["all", *[""] * (len(groups) - 1)] if last else [_group(row, group) or "" for group in groups]
    return [
        *heads[: len(groups)],
        f"{row.calls:,}",
        f"{row.usage.prompt_tokens:,}",
        f"{row.usage.completion_tokens:,}",
        format_usd(row.cost),
        format_usd(row.suspense),
    ]


def _as_json(row: UsageRow) -> dict[str, object]:
    return {
        "calls": row.calls,
        "answered": row.answered,
        "prompt_tokens": row.usage.prompt_tokens,
        "cached_tokens": row.usage.cached_tokens,
        "completion_tokens": row.usage.completion_tokens,
        "reasoning_tokens": row.usage.reasoning_tokens,
        "cost_nano_usd": row.cost,
        "suspense_nano_usd": row.suspense,
    }


def _suspense_cells(row: SuspenseRow) -> list[str]:
    return [
        f"{row.job_id}:{row.run}:{row.call}",
        row.tenant,
        f"{row.provider}/{row.model}",
        f"{row.since:%Y-%m-%d %H:%M:%S}",
        row.reason or "",
        format_usd(row.amount),
    ]


def _suspense_json(row: SuspenseRow) -> dict[str, object]:
    return {
        "job_id": str(row.job_id),
        "run": row.run,
        "call": row.call,
        "tenant": row.tenant,
        "provider": row.provider,
        "model": row.model,
        "reason": row.reason,
        "suspense_nano_usd": row.amount,
        "since": row.since.isoformat(),
    }
