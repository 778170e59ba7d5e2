"""Chaos over a fixed list of seeds, as a table in Markdown: `make chaos-long`."""

import json
import subprocess
import sys
from typing import Annotated

import typer
from pydantic import BaseModel

SEEDS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
_COMMAND = (sys.executable, "-P", "-c", "from headrace_producer.cli import main; main()", "chaos", "--json")


class Checked(BaseModel):
    checks: int
    violations: int


class Ran(BaseModel):
    seed: int
    minutes: float
    good: bool
    done: int
    not_done: int
    jobs: int
    calls: int
    invariants: dict[str, Checked]

    @property
    def violations(self) -> int:
        return sum(one.violations for one in self.invariants.values())


def main(*, minutes: Annotated[float, typer.Option(help="Of each seed.")] = 3.0, seeds: str = "") -> None:
    """Run chaos once for each seed; exit 1 when a promise was broken, or a run proves nothing."""
    chosen = [int(seed) for seed in seeds.split(",")] if seeds else list(SEEDS)
    ran = [_run(seed, minutes) for seed in chosen]
    print("\n".join([*_by_seed(ran), "", *_by_invariant(ran)]))
    raise typer.Exit(not all(one.good for one in ran))


def _run(seed: int, minutes: float) -> Ran:
    command = (*_COMMAND, "--seed", str(seed), "--minutes", str(minutes))
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603 - our own command
    return Ran.model_validate(json.loads(done.stdout.splitlines()[-1]))


def _by_seed(ran: list[Ran]) -> list[str]:
    rows = [
        f"| {one.seed} | {one.minutes:g} | {one.done} | {one.not_done} "
        f"| {one.jobs:,} | {one.calls:,} | {one.violations} |"
        for one in ran
    ]
    total = (
        f"| **all** | **{sum(one.minutes for one in ran):g}** | **{sum(one.done for one in ran)}** "
        f"| **{sum(one.not_done for one in ran)}** "
        f"| **{sum(one.jobs for one in ran):,}** | **{sum(one.calls for one in ran):,}** "
        f"| **{sum(one.violations for one in ran)}** |"
    )
    return [
        "| seed | minutes | faults | not done | jobs | calls | violations |",
        "|---|---|---|---|---|---|---|",
        *rows,
        total,
    ]


def _by_invariant(ran: list[Ran]) -> list[str]:
    names = ran[0].invariants if ran else {}
    return [
        "| invariant | checks | violations |",
        "|---|---|---|",
        *(_sum_of(name, [one.invariants[name] for one in ran]) for name in names),
    ]


def _sum_of(name: str, ran: list[Checked]) -> str:
    checks, violations = sum(one.checks for one in ran), sum(one.violations for one in ran)
    return f"| {name} | {checks:,} | {violations if checks or violations else 'not checked'} |"


if __name__ == "__main__":
    typer.run(main)
