"""`headrace pause`, `resume` and `pauses`: jobs that an operator keeps back."""

import asyncio
from datetime import timedelta
from typing import Annotated

import typer

from headrace_producer.checking import check_tenant
from headrace_producer.commands.options import AsJson, read_duration
from headrace_producer.connections import Connections, open_connections
from headrace_producer.console import Console
from headrace_producer.in_force import read_snapshot
from headrace_shared.dispatch.dispatch import Dispatch
from headrace_shared.errors import InvalidInput
from headrace_shared.handlers import public_lane
from headrace_shared.ids import Lane
from headrace_shared.pauses import EVERYTHING, LANE, MODEL, TENANT, Pauses
from headrace_shared.request import MAX_MODEL_LENGTH
from headrace_shared.settings import load_settings
from headrace_shared.store import feed
from headrace_shared.store import pauses as store
from headrace_shared.store.pauses import Pause

Scope = Annotated[str, typer.Argument(metavar="SCOPE", help="lane:NAME, tenant:NAME, model:NAME, or global.")]
For = Annotated[
    str | None, typer.Option("--for", metavar="DURATION", help="Go on by itself after this, such as 10m.")
]


def pause(scope: Scope, *, duration: For = None, as_json: AsJson = False) -> None:
    """Begin no more jobs of a lane, a tenant, a model, or any; those under way go on."""
    asyncio.run(_pause(Console(as_json), scope, read_positive("--for", duration)))


def resume(scope: Scope, *, as_json: AsJson = False) -> None:
    """Let what was paused go on, at once."""
    asyncio.run(_resume(Console(as_json), scope))


def pauses(*, as_json: AsJson = False) -> None:
    """Show what is paused, and since when."""
    asyncio.run(_show(Console(as_json)))


queues = typer.Typer(help="The same as pause, resume and pauses.", rich_markup_mode=None)
queues.command("pause")(pause)
queues.command("resume")(resume)
queues.command("show")(pauses)


def read_positive(option: str, text: str | None) -> timedelta | None:
    """Read how long something is to last.

    Raises:
        InvalidInput: it is no duration, or nothing.

    """
    duration = read_duration(option, text)
    if duration is not None and duration < timedelta(milliseconds=1):
        raise InvalidInput(reason=f"{option}: must be longer than nothing.")
    return duration


def end_of(pause: Pause) -> str:
    """Say until when a pause lasts."""
    return "until resumed" if pause.until is None else f"until {pause.until:%Y-%m-%d %H:%M:%S %Z}"


async def _pause(console: Console, text: str, duration: timedelta | None) -> None:
    async with open_connections(load_settings()) as connections:
        scope = _checked(text)
        await _check_lane(connections, scope)
        made = await _pauses(connections).pause(scope, duration)
    what = "Every job" if scope == EVERYTHING else scope
    console.say(f"{what} is paused {end_of(made)}: what runs goes on, the rest waits in its queues.")
    console.conclude(_as_json(made))


async def _resume(console: Console, text: str) -> None:
    scope = _checked(text)
    async with open_connections(load_settings()) as connections:
        resumed = await _pauses(connections).resume(scope)
    console.say(f"{scope} {'goes on' if resumed else 'was not paused'}.")
    console.conclude({"scope": scope, "resumed": resumed})


async def _show(console: Console) -> None:
    async with open_connections(load_settings()) as connections:
        found = await store.in_force(connections.pool)
    if not found:
        console.say("Nothing is paused.")
    else:
        rows = [(one.scope, f"{one.since:%Y-%m-%d %H:%M:%S %Z}", end_of(one)) for one in found]
        console.table(("scope", "since", "until"), rows)
    console.conclude({"pauses": [_as_json(one) for one in found]})


def _pauses(connections: Connections) -> Pauses:
    return Pauses(connections.pool, Dispatch(connections.redis))


def _checked(scope: str) -> str:
    kind, _, name = scope.partition(":")
    if scope == EVERYTHING:
        return scope
    if kind == TENANT:
        return f"{TENANT}:{check_tenant(name)}"
    if kind == MODEL and name.isprintable() and 0 < len(name) <= MAX_MODEL_LENGTH and " " not in name:
        return scope
    if kind == LANE and name:
        return f"{LANE}:{public_lane(Lane(name))}"
    raise InvalidInput(
        reason=f"{scope!r:.64} cannot be paused: write lane:NAME, tenant:NAME, model:NAME, or global."
    )


async def _check_lane(connections: Connections, scope: str) -> None:
    """Refuse a lane that nobody can put jobs into, and no worker serves."""
    kind, _, name = scope.partition(":")
    if kind != LANE:
        return
    configured = (await read_snapshot(connections.pool)).configuration.lanes
    workers = await feed.live_workers(connections.pool)
    served = {public_lane(Lane(lane)) for worker in workers for lane in worker.lanes}
    if name not in configured and name not in served:
        raise InvalidInput(reason=f"There is no lane {name!r:.64}: the lanes are {', '.join(configured)}.")


def _as_json(pause: Pause) -> dict[str, object]:
    return {
        "scope": pause.scope,
        "since": pause.since.isoformat(),
        "until": pause.until.isoformat() if pause.until else None,
    }
