"""What a measurement hands over: figures, some of them with a target."""

import sys
import time
from dataclasses import asdict, dataclass
from statistics import median

from rich.table import Table

_BEGAN = time.monotonic()


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured value."""

    measurement: str
    name: str
    value: float
    unit: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None where there is none."""
        if self.at_least is None and self.at_most is None:
            return None
        return (self.at_least is None or self.value >= self.at_least) and (
            self.at_most is None or self.value <= self.at_most
        )

    @property
    def target(self) -> str:
        if self.at_least is not None:
            return f">= {_shown(self.at_least)}"
        return "" if self.at_most is None else f"<= {_shown(self.at_most)}"

    def as_json(self) -> dict[str, object]:
        return {**asdict(self), "met": self.met}


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast jobs were done, and what they cost one side in processor time."""

    jobs_per_second: float
    cpu_ms_per_job: float


def middle(paces: list[Pace]) -> Pace:
    return Pace(median(pace.jobs_per_second for pace in paces), median(pace.cpu_ms_per_job for pace in paces))


def progress(text: str) -> None:
    print(f"[{time.monotonic() - _BEGAN:4.0f} s] {text}", file=sys.stderr, flush=True)


def table(figures: list[Figure], title: str = "What a job costs") -> Table:
    shown = Table("measurement", "figure", title=title, title_justify="left")
    shown.add_column("value", justify="right")
    shown.add_column("unit")
    shown.add_column("target", justify="right")
    shown.add_column("")
    last = ""
    for figure in figures:
        if last and figure.measurement != last:
            shown.add_section()
        mark = {None: "", True: "[green]met[/]", False: "[red]missed[/]"}[figure.met]
        name = "" if figure.measurement == last else figure.measurement
        shown.add_row(name, figure.name, _shown(figure.value), figure.unit, figure.target, mark)
        last = figure.measurement
    return shown


def _shown(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
