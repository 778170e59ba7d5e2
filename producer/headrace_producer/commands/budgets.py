"""`headrace budgets`: what may be spent, by whom, in which time."""

import asyncio
from typing import Annotated, assert_never

import typer

from headrace_producer.commands.options import AsJson
from headrace_producer.commands.prospects import HOW, look_ahead
from headrace_producer.connections import open_connections
from headrace_producer.console import Console
from headrace_shared.budgets import Budgets, BudgetView
from headrace_shared.configuration import Configuration
from headrace_shared.errors import InvalidInput
from headrace_shared.money import NanoUSD, format_usd, parse_usd
from headrace_shared.scopes import GLOBAL, parse_scope
from headrace_shared.settings import load_settings
from headrace_shared.store import configurations
from headrace_shared.store.money import (
    BudgetPolicy,
    BudgetState,
    TimeZone,
    WindowKind,
    budget_state,
    time_zone,
    was_charged,
)

app = typer.Typer(help="Hard limits of what may be spent.", rich_markup_mode=None)

Scope = Annotated[
    str,
    typer.Argument(metavar="SCOPE", help="global, tenant:NAME, key:NAME, model:NAME, batch:ID or tag:NAME."),
]
Window = Annotated[WindowKind, typer.Option(help="In all, or each day, week or month.")]


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
    asyncio.run(_set(Console(as_json), parse_scope(scope), window, parse_usd(limit), policy))


@app.command()
def show(*, as_json: AsJson = False) -> None:
    """Show every budget with what its present window has used."""
    asyncio.run(_show(Console(as_json)))


@app.command()
def remove(scope: Scope, *, window: Window = WindowKind.TOTAL, as_json: AsJson = False) -> None:
    """Remove a budget: nothing limits its scope and window any more."""
    asyncio.run(_remove(Console(as_json), parse_scope(scope), window))


@app.command("zone")
def set_zone(
    name: Annotated[
        str | None, typer.Argument(metavar="ZONE", help="Such as Europe/Berlin; without it, say which it is.")
    ] = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Set, or say, the time zone in which days, weeks and months are counted.

    What was spent before stays in the windows in which it was held; a window that goes on under the same
    name goes on with what it has.
    """
    asyncio.run(_zone(Console(as_json), name))


async def _set(
    console: Console, scope: str, window: WindowKind, limit: NanoUSD, policy: BudgetPolicy
) -> None:
    async with open_connections(load_settings()) as connections:
        await Budgets(connections.pool, connections.redis).set(scope, window, limit, policy)
        states = await budget_state(connections.pool)
        charged = await was_charged(connections.pool, scope)
        present = (await configurations.current(connections.pool)).configuration
    console.say(
        f"{scope} may spend {format_usd(limit)} {_every(window)}; {_what_does_not_fit(window, policy)}."
    )
    for state in states:
        if (state.scope, state.kind) == (scope, window) and state.settled + state.suspense >= limit:
            console.say(_nothing_is_left(state))
    if not charged and scope != GLOBAL:
        console.say(f"Nothing was ever charged to {scope}: it counts from the first call that is.")
        hint = _as_jobs_name_it(present, scope)
        if hint:
            console.say(hint)
    console.conclude({"scope": scope, "window": window, "limit_nano_usd": limit, "policy": policy})


def _as_jobs_name_it(present: Configuration, scope: str) -> str:
    """Say what is meant where a model is named as limits name it, with its provider; else nothing."""
    kind, _, name = scope.partition(":")
    provider, _, model = name.partition("/")
    if kind != "model" or not model or provider not in present.providers or name in present.routes:
        return ""
    return f"A job names a model without its provider: if that is meant, set model:{model}."


def _what_does_not_fit(window: WindowKind, policy: BudgetPolicy) -> str:
    match policy:
        case BudgetPolicy.SOFT:
            return "a job that does not fit runs all the same, and is counted"
        case BudgetPolicy.REJECT:
            return "a job that does not fit fails, once no call under way can still make room for it"
        case BudgetPolicy.DOWNGRADE:
            first = "a job that does not fit goes to the next target of its route that does; else it"
        case BudgetPolicy.WAIT:
            first = "a job that does not fit"
        case _:
            assert_never(policy)
    if window is WindowKind.TOTAL:
        return (
            f"{first} fails, once no call under way can still make room for it, "
            "because a total never begins anew"
        )
    return f"{first} waits for the next {window}, and fails if its call alone can cost more than the limit"


def _nothing_is_left(state: BudgetState) -> str:
    used = f"{format_usd(state.settled)} is settled"
    if state.suspense:
        used += f" and {format_usd(state.suspense)} in suspense"
    if state.policy is BudgetPolicy.SOFT:
        return f"All of it is used already ({used}), and calls go on."
    until = "" if state.kind is WindowKind.TOTAL else f" before the next {state.kind}"
    return f"All of it is used already ({used}): no call that costs anything goes out under it{until}."


async def _zone(console: Console, name: str | None) -> None:
    async with open_connections(load_settings()) as connections:
        if name is not None:
            await Budgets(connections.pool, connections.redis).set_time_zone(name)
        zone = await time_zone(connections.pool)
    console.say(_in_words(zone))
    console.conclude(
        {"zone": zone.name, "next": zone.next, "since": zone.next_since and zone.next_since.isoformat()}
    )


def _in_words(zone: TimeZone) -> str:
    sentence = f"Days, weeks and months are counted in {zone.name}"
    if zone.next is None or zone.next_since is None:
        return f"{sentence}."
    return f"{sentence}, and from {zone.next_since:%Y-%m-%d %H:%M} UTC on in {zone.next}."


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
