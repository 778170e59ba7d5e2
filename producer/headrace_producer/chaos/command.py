"""The command `headrace chaos`."""

import asyncio
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headrace_producer.commands.options import AsJson
from headrace_producer.console import Console
from headrace_producer.interrupts import cancel_on_signals
from headrace_shared.errors import HeadraceError, InvalidConfiguration
from headrace_shared.settings import Settings, load_settings

if TYPE_CHECKING:
    from headrace_producer.chaos.performance import Options

_INTERRUPTED = 130
_SHORTEST, _LONGEST = 0.25, 24 * 60.0


def chaos(
    *,
    seed: Annotated[
        int | None, typer.Option(help="The same seed gives the same faults. Default: any.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="How long faults are done; draining comes on top.")] = 2.0,
    faults: Annotated[
        str | None, typer.Option(metavar="A,B", help="Only these: names or patterns, as worker-kill,drop-*.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Worker processes.")] = 3,
    rate: Annotated[float, typer.Option(min=1, max=1000, help="Jobs a second.")] = 40.0,
    allow_server_faults: Annotated[
        bool, typer.Option("--allow-server-faults", help="Do to given servers what all their users notice.")
    ] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the logs of a good run, too.")] = False,
    list_faults: Annotated[bool, typer.Option("--list", help="Name every fault, and do nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run jobs under faults that a seed chooses, and check that none is lost, ended or paid for twice.

    Without HEADRACE_POSTGRES_URL and HEADRACE_REDIS_URL it starts servers of its own; with them it runs
    against empty servers of yours: it refuses a Redis database with any key of Headrace, and a Postgres
    database with other live workers, unfinished jobs or a configuration. Only chaos' own processes and
    connections are disturbed there.
    """
    console = Console(as_json)
    if list_faults:
        raise typer.Exit(_list(console))
    if not _SHORTEST <= minutes <= _LONGEST:
        raise InvalidConfiguration(where="--minutes", reason=f"must be from {_SHORTEST:g} to {_LONGEST:,.0f}")
    # Here, so that every other command starts without the parts of this one.
    from headrace_producer.chaos.faults import choose  # noqa: PLC0415
    from headrace_producer.chaos.performance import Options  # noqa: PLC0415
    from headrace_producer.chaos.servers import are_given  # noqa: PLC0415

    settings = load_settings()
    names = None if faults is None else [name.strip() for name in faults.split(",")]
    chosen = choose(names, own_servers=not are_given(settings), allow_server_faults=allow_server_faults)
    number = seed if seed is not None else secrets.randbelow(1_000_000)
    options = Options(number, minutes, chosen, workers, rate)
    if not options.events():
        raise InvalidConfiguration(where="--minutes", reason="is too short for any of these faults")
    try:
        code = asyncio.run(_chaos(console, settings, options, keep=keep))
    except asyncio.CancelledError:
        typer.echo("headrace: stopped; everything that was started has ended", err=True)
        code = _INTERRUPTED
    raise typer.Exit(code)


def _list(console: Console) -> int:
    from headrace_producer.chaos.faults import FAULTS  # noqa: PLC0415 - other commands start without it

    for fault in FAULTS.values():
        console.say(f"{fault.name:30} {fault.about}; {fault.needs}")
    console.conclude({"faults": list(FAULTS)})
    return 0


async def _chaos(console: Console, settings: Settings, options: "Options", *, keep: bool) -> int:
    from headrace_producer.chaos import report  # noqa: PLC0415 - as above
    from headrace_producer.chaos.performance import perform  # noqa: PLC0415
    from headrace_producer.chaos.screen import Screen  # noqa: PLC0415

    cancel_on_signals()
    directory = Path(tempfile.mkdtemp(prefix="headrace-chaos-"))
    screen = Screen(stderr=console.as_json)
    screen.event(f"seed {options.seed}, {options.minutes:g} minutes, {len(options.faults)} kinds of faults")
    kept = True
    try:
        ending = await perform(options, settings, directory, screen)
        kept = keep or not ending.good
    except (HeadraceError, asyncio.CancelledError):
        kept = False
        raise
    finally:
        if kept:
            screen.event(f"logs are kept in {directory}")
        else:
            shutil.rmtree(directory, ignore_errors=True)
    report.show(ending, screen)
    console.conclude(ending.as_json())
    return 0 if ending.good else 1
