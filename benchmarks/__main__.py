"""What a job costs, beside the bare provider call: `make bench`.

Servers and the simulated provider run on this machine, so that the ratios say more than
the rates: both sides of a ratio are from the same run.
"""

import asyncio
import json
import resource
import signal
from collections.abc import Awaitable, Callable
from typing import Annotated

import bounds
import enqueueing
import fairness
import leave
import machine
import many_workers
import memory
import one_worker
import outage
import pickup
import quoting
import recovery
import sharing
import typer
from figures import Figure, progress, table
from rich.console import Console

_Measure = Callable[[int], Awaitable[list[Figure]]]
_MEASUREMENTS: dict[str, _Measure] = {
    "one-worker": one_worker.measure,
    "many-workers": many_workers.measure,
    "enqueue": enqueueing.measure,
    "pickup": pickup.measure,
    "memory": memory.measure,
    "leave": leave.measure,
    "recovery": recovery.measure,
    "quote": quoting.measure,
    "outage": outage.measure,
    "fairness": fairness.measure,
    "sharing": sharing.measure,
    "bounds": bounds.measure,
}
_ON_REQUEST = ("recovery", "quote", "outage", "fairness", "sharing", "bounds")
"""Measured only when named: they last minutes, or run no jobs."""


def main(
    *,
    only: Annotated[str, typer.Option(help=f"Some of {', '.join(_MEASUREMENTS)}.")] = "",
    jobs: Annotated[int, typer.Option(min=400, help="Jobs in one run.")] = 1500,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as a line of JSON.")] = False,
) -> None:
    """Measure what a job costs, beside the bare provider call."""
    every = [name for name in _MEASUREMENTS if name not in _ON_REQUEST]
    names = [name.strip() for name in only.split(",")] if only else every
    for name in names:
        if name not in _MEASUREMENTS:
            raise typer.BadParameter(
                f"{name!r} is not one of {', '.join(_MEASUREMENTS)}", param_hint="--only"
            )
    _allow_many_files()
    about = machine.describe()
    progress(", ".join(f"{name} {value}" for name, value in about.items()))
    figures = asyncio.run(_measure(names, jobs))
    console = Console(stderr=as_json)
    if not console.is_terminal:
        console.width = 120
    console.print(table(figures))
    if as_json:
        print(json.dumps({"machine": about, "figures": [figure.as_json() for figure in figures]}))


async def _measure(names: list[str], jobs: int) -> list[Figure]:
    if (task := asyncio.current_task()) is not None:
        # The servers are stopped on the way out.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    figures: list[Figure] = []
    for name in names:
        progress(f"measuring {name}")
        figures += await _MEASUREMENTS[name](jobs)
    return figures


def _allow_many_files() -> None:
    """Each call in flight is a connection at both of its ends."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


if __name__ == "__main__":
    typer.run(main)
