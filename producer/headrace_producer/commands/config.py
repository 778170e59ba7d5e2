"""`headrace config`: the configuration in force, and the versions before it."""

import asyncio
import json
from pathlib import Path
from typing import Annotated

import typer

from headrace_producer.commands.options import AsJson
from headrace_producer.connections import open_connections
from headrace_producer.console import Console
from headrace_shared.configuration import Configuration, parse_toml
from headrace_shared.errors import InvalidConfiguration
from headrace_shared.settings import load_settings
from headrace_shared.store import configurations
from headrace_shared.store.pool import Database

app = typer.Typer(
    help="Providers, routes, prices and how the parts behave, in versions.", rich_markup_mode=None
)

_DEFAULT_FILE = Path("headrace.toml")


@app.command("apply")
def apply_file(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="Default: HEADRACE_CONFIG, else headrace.toml.")
    ] = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Put a headrace.toml in force, for all producers and workers at once."""
    path = file or load_settings().config or _DEFAULT_FILE
    asyncio.run(_apply(Console(as_json), _read(path), str(path)))


@app.command()
def show(
    version: Annotated[int | None, typer.Argument(min=0, help="Default: the one in force.")] = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Show a configuration, without the defaults."""
    asyncio.run(_show(Console(as_json), version))


@app.command()
def history(*, as_json: AsJson = False) -> None:
    """List the newest versions, newest first."""
    asyncio.run(_history(Console(as_json)))


@app.command()
def rollback(
    version: Annotated[int, typer.Argument(min=0, help="0 is the built-in one.")], *, as_json: AsJson = False
) -> None:
    """Put an older version in force again, as a new one."""
    asyncio.run(_rollback(Console(as_json), version))


def _read(path: Path) -> Configuration:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        reason = f"cannot be read ({error.strerror or type(error).__name__})"
        raise InvalidConfiguration(where=str(path), reason=reason) from None
    except UnicodeDecodeError:
        raise InvalidConfiguration(where=str(path), reason="is not UTF-8 text") from None
    return parse_toml(text, str(path))


async def _apply(console: Console, configuration: Configuration, source: str) -> None:
    async with open_connections(load_settings()) as connections:
        applied = await configurations.apply(connections.pool, configuration, source)
    said = "is in force" if applied.changed else "was in force already"
    console.say(f"Version {applied.version} {said}.")
    console.conclude({"version": applied.version, "changed": applied.changed})


async def _show(console: Console, version: int | None) -> None:
    async with open_connections(load_settings()) as connections:
        found = await configurations.current(connections.pool)
        if version is not None:
            found = configurations.Versioned(version, await _get(connections.pool, version))
    document = found.configuration.document()
    console.note(f"Version {found.version}{'' if document else ': the built-in configuration'}")
    console.say(json.dumps(document, indent=2, ensure_ascii=False))
    console.conclude({"version": found.version, "configuration": document})


async def _history(console: Console) -> None:
    async with open_connections(load_settings()) as connections:
        entries = await configurations.history(connections.pool)
    if not entries:
        console.say("No configuration was applied: the built-in one is in force.")
    else:
        console.table(
            ("version", "applied at", "source"),
            [(str(one.version), f"{one.applied_at:%Y-%m-%d %H:%M:%S}", one.source) for one in entries],
        )
    versions = [
        {"version": one.version, "source": one.source, "applied_at": one.applied_at.isoformat()}
        for one in entries
    ]
    console.conclude({"versions": versions})


async def _rollback(console: Console, version: int) -> None:
    async with open_connections(load_settings()) as connections:
        configuration = await _get(connections.pool, version)
        applied = await configurations.apply(connections.pool, configuration, f"rollback to {version}")
    said = f"says what version {version} said, and is in force" if applied.changed else "was in force already"
    console.say(f"Version {applied.version} {said}.")
    console.conclude({"version": applied.version, "changed": applied.changed})


async def _get(database: Database, version: int) -> Configuration:
    if version == 0:
        return Configuration.default()
    found = await configurations.get(database, version)
    if found is None:
        raise InvalidConfiguration(where=f"version {version}", reason="there is no such configuration")
    return found
