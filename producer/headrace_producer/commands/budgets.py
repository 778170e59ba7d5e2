"""`headrace budgets`: what may be spent, by whom, in which time."""

import asyncio
from typing import Annotated

import typer

from headrace_producer.checking import check_tenant
from headrace_producer.commands.options import AsJson
from headrace_producer.commands.prospects import HOW, look_ahead
from headrace_producer.connections import open_connections
from headrace_producer.console import Console
from headrace_shared.budgets import Budgets, BudgetView, scopes_of
from headrace_shared.errors import InvalidInput
from headrace_shared.money import NanoUSD, format_usd, parse_usd
from headrace_shared.settings import load_settings
from headrace_shared.store.money import BudgetPolicy, WindowKind

app = typer.Typer(help="Hard limits of what may be spent.", rich_markup_mode=None)

Scope = Annotated[str, typer.Argument(metavar="SCOPE", help="global, or tenant:NAME.")]
Window = Annotated[WindowKind, typer.Option(help="In all, or each day or month (UTC).")]


@app.callback(invoke_without_command=True)
def budgets(context: typer.Context, *, as_json: AsJson = False) -> None:
    """Show every budget; hard limits of what may be spent are set and removed by its commands."""
    if context.invoked_subcommand is None:
        show(as_json=as_json)


@app.command("set")
def set_budget(
    scope: Scope,
    *,
    limit: Annotated[str, typer.Option(metavar="DOLLARS", help="Such as 5.00.")],
    window: Window = WindowKind.TOTAL,
    policy: Annotated[
        BudgetPolicy, typer.Option(help="What a job does that does not fit.")
    ] = BudgetPolicy.WAIT,
    as_json: AsJson = False,
) -> None:
    """Set a budget; it holds at once, for what is under way as well."""
    asyncio.run(_set(Console(as_json), _checked(scope), window, parse_usd(limit), policy))


@app.command()
def show(*, as_json: AsJson = False) -> None:
    """Show every budget with what its present window has used."""
    asyncio.run(_show(Console(as_json)))


@app.command()
def remove(scope: Scope, *, window: Window = WindowKind.TOTAL, as_json: AsJson = False) -> None:
    """Remove a budget: nothing limits its scope and window any more."""
    asyncio.run(_remove(Console(as_json), _checked(scope), window))


def _checked(scope: str) -> str:
    if scope == "global":
        return scope
    kind, _, name = scope.partition(":")
    if kind != "tenant":
        raise InvalidInput(reason=f"{scope!r} is not a scope: write global, or tenant:NAME.")
    return scopes_of(check_tenant(name))[-1]


async def _set(
    console: Console, scope: str, window: WindowKind, limit: NanoUSD, policy: BudgetPolicy
) -> None:
    async with open_connections(load_settings()) as connections:
        await Budgets(connections.pool, connections.redis).set(scope, window, limit, policy)
    console.say(
        f"{scope} may spend {format_usd(limit)} {_every(window)}; {_what_does_not_fit(window, policy)}."
    )
    console.conclude({"scope": scope, "window": window, "limit_nano_usd": limit, "policy": policy})


def _what_does_not_fit(window: WindowKind, policy: BudgetPolicy) -> str:
    if window is WindowKind.TOTAL:
        return "what does not fit waits for calls under way and then fails: a total never comes again"
    if policy is BudgetPolicy.REJECT:
        return "what does not fit waits for calls under way and then fails"
    return f"what does not fit waits for the next {window}"


async def _show(console: Console) -> None:
    async with open_connections(load_settings()) as connections:
        views = await Budgets(connections.pool, connections.redis).view()
        prospects = await look_ahead(connections.pool, [view.state for view in views])
    pairs = list(zip(views, prospects, strict=True))
    if not views:
        console.say("There are no budgets: nothing limits what is spent.")
    else:
        amounts = ("limit", "settled", "held", "suspense", "remaining")
        console.table(
            ("scope", "window", "policy", *amounts, "window ends", "forecast"),
            [
                (
                    view.state.scope,
                    view.state.window,
                    view.state.policy,
                    *map(format_usd, _amounts(view)),
                    prospect.end_in_words,
                    prospect.in_words,
                )
                for view, prospect in pairs
            ],
        )
        if any(prospect.forecast for prospect in prospects):
            console.say(HOW)
    console.conclude({"budgets": [_as_json(view) | prospect.as_json() for view, prospect in pairs]})


async def _remove(console: Console, scope: str, window: WindowKind) -> None:
    async with open_connections(load_settings()) as connections:
        removed = await Budgets(connections.pool, connections.redis).remove(scope, window)
    if not removed:
        raise InvalidInput(reason=f"There is no budget of {scope} {_every(window)}.")
    console.say(f"The budget of {scope} {_every(window)} is removed.")
    console.conclude({"scope": scope, "window": window, "removed": removed})


def _every(window: WindowKind) -> str:
    return "in total" if window is WindowKind.TOTAL else f"a {window}"


def _amounts(view: BudgetView) -> tuple[NanoUSD, ...]:
    return view.state.limit, view.state.settled, view.held, view.state.suspense, view.remaining


def _as_json(view: BudgetView) -> dict[str, object]:
    limit, settled, held, suspense, remaining = _amounts(view)
    return {
        "scope": view.state.scope,
        "window": view.state.kind,
        "window_name": view.state.window,
        "policy": view.state.policy,
        "limit_nano_usd": limit,
        "settled_nano_usd": settled,
        "held_nano_usd": held,
        "suspense_nano_usd": suspense,
        "remaining_nano_usd": remaining,
    }
