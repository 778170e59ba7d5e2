"""`headrace breakers`: which targets are called, and which an operator keeps from being called."""

import asyncio
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated

import typer

from headrace_producer.commands.options import AsJson
from headrace_producer.commands.pauses import For, end_of, read_positive
from headrace_producer.connections import Connections, open_connections, redis_may_be_away
from headrace_producer.console import Console, in_words
from headrace_producer.in_force import read_snapshot
from headrace_shared import breaker_gates
from headrace_shared.configuration import Configuration
from headrace_shared.dispatch import breakers
from headrace_shared.dispatch.breakers import View
from headrace_shared.dispatch.dispatch import Dispatch
from headrace_shared.errors import InvalidInput
from headrace_shared.pauses import paused_target, target_scope
from headrace_shared.routes import Target
from headrace_shared.settings import load_settings
from headrace_shared.store import pauses
from headrace_shared.store.pauses import Pause

app = typer.Typer(help="Circuit breakers, one for each model of each provider.", rich_markup_mode=None)

TargetName = Annotated[str, typer.Argument(metavar="TARGET", help="Such as openai/gpt-4o-mini.")]


@dataclass(frozen=True, slots=True)
class _Breaker:
    target: Target
    view: View
    held: Pause | None
    """By whom it is held open, if an operator does."""


@app.command()
def show(
    target: Annotated[str | None, typer.Argument(metavar="TARGET", help="Only this one.")] = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Show breakers: their state, and what calls of late came to."""
    asyncio.run(_show(Console(as_json), target))


@app.command("open")
def open_(target: TargetName, *, duration: For = None, as_json: AsJson = False) -> None:
    """Call a target no more, until its breaker is closed by hand, or for a time; calls that are out go on."""
    asyncio.run(_open(Console(as_json), target, read_positive("--for", duration)))


@app.command()
def close(target: TargetName, *, as_json: AsJson = False) -> None:
    """Call a target again, without waiting for a probe."""
    asyncio.run(_close(Console(as_json), target))


async def _show(console: Console, name: str | None) -> None:
    async with open_connections(load_settings()) as connections:
        configuration = (await read_snapshot(connections.pool)).configuration
        found = await _read(connections, configuration, name)
    if not found:
        console.say("There are no breakers yet: no target was called of late.")
    else:
        console.table(
            ("target", "state", "failed", "calls", "failure rate"),
            [
                (str(one.target), _state(one), *(f"{number:,}" for number in _calls(one)), _rate(one))
                for one in found
            ],
        )
        console.say(f"Calls are those of the last {in_words(configuration.breaker.window)}.")
    console.conclude({"breakers": [_as_json(one) for one in found]})


async def _read(connections: Connections, configuration: Configuration, name: str | None) -> list[_Breaker]:
    held = {
        target: pause
        for pause in await pauses.in_force(connections.pool)
        if (target := paused_target(pause)) is not None
    }
    if name is None:
        routed = {Target(one.provider, one.model) for r in configuration.routes.values() for one in r.targets}
        wanted = routed | set(held) | set(await breakers.known(connections.redis))
    else:
        wanted = {_parse(name, configuration)}
    window = configuration.breaker.window
    return [
        _Breaker(target, await breakers.view(connections.redis, target, window), held.get(target))
        for target in sorted(wanted, key=str)
    ]


async def _open(console: Console, name: str, duration: timedelta | None) -> None:
    async with open_connections(load_settings()) as connections:
        configuration = (await read_snapshot(connections.pool)).configuration
        target = _parse(name, configuration)
        held = await pauses.pause(connections.pool, target_scope(target), duration)
        with redis_may_be_away(console):
            await breaker_gates.hold_open(Dispatch(connections.redis), configuration, target, duration)
    end = "until it is closed by hand" if held.until is None else end_of(held)
    console.say(f"The breaker of {target} is open {end}.")
    console.conclude(
        {"target": str(target), "state": "open", "until": held.until.isoformat() if held.until else None}
    )


async def _close(console: Console, name: str) -> None:
    async with open_connections(load_settings()) as connections:
        configuration = (await read_snapshot(connections.pool)).configuration
        target = _parse(name, configuration)
        closed = await pauses.resume(connections.pool, target_scope(target))
        with redis_may_be_away(console):
            closed |= await breaker_gates.release(Dispatch(connections.redis), configuration, target)
    console.say(f"The breaker of {target} {'is closed' if closed else 'was not open'}.")
    console.conclude({"target": str(target), "state": "closed", "changed": closed})


def _parse(name: str, configuration: Configuration) -> Target:
    try:
        target = Target.parse(name)
    except ValueError as error:
        raise InvalidInput(reason=f"{name!r:.64} is not a target: it {error}.") from None
    if target.provider not in configuration.providers or not name.isprintable():
        known = ", ".join(configuration.providers)
        raise InvalidInput(reason=f"There is no provider {target.provider!r:.64}: the providers are {known}.")
    return target


def _state(one: _Breaker) -> str:
    if one.held is not None:
        end = "closed by hand" if one.held.until is None else f"{one.held.until:%Y-%m-%d %H:%M:%S %Z}"
        return f"open until {end}"
    match _word(one):
        case "open":
            return f"open, a probe may go in {in_words(one.view.reopens_in)}"
        case word:
            return word


def _word(one: _Breaker) -> str:
    if one.held is not None or one.view.reopens_in or (one.view.is_open and not one.view.probing):
        return "open"
    return "probing" if one.view.is_open else "closed"


def _calls(one: _Breaker) -> tuple[int, int]:
    return one.view.failed, one.view.failed + one.view.answered


def _rate(one: _Breaker) -> str:
    failed, calls = _calls(one)
    return f"{failed / calls:.0%}" if calls else "-"


def _as_json(one: _Breaker) -> dict[str, object]:
    failed, calls = _calls(one)
    return {
        "target": str(one.target),
        "state": _word(one),
        "by_hand": one.held is not None,
        "since": one.held.since.isoformat() if one.held else None,
        "until": one.held.until.isoformat() if one.held and one.held.until else None,
        "probe_in_seconds": one.view.reopens_in.total_seconds()
        if one.view.is_open and not one.held
        else None,
        "failed": failed,
        "calls": calls,
        "failure_rate": failed / calls if calls else None,
    }
