"""A run's last words: a table for people, an object for machines."""

from collections.abc import Sequence
from dataclasses import dataclass

from headrace_producer.chaos.auditor import Finding
from headrace_producer.chaos.screen import Screen
from headrace_shared.money import NanoUSD, format_usd

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Report:
    """What a run came to."""

    seed: int
    minutes: float
    faults: int
    kinds: int
    """Different faults among them."""
    jobs: int
    calls: int
    callbacks: int
    cost: NanoUSD
    suspense: NanoUSD
    busiest: tuple[int, int]
    """The most log lines, and the most new connections, of a worker in ten seconds."""
    standstill: tuple[float, float]
    """For how many seconds no job ended, at most, and when that was over."""
    findings: Sequence[Finding]

    @property
    def good(self) -> bool:
        return not any(finding.violations for finding in self.findings)

    def as_json(self) -> dict[str, object]:
        """Return it as an object; amounts are nano-USD."""
        return {
            "seed": self.seed,
            "minutes": self.minutes,
            "faults": self.faults,
            "jobs": self.jobs,
            "calls": self.calls,
            "callbacks": self.callbacks,
            "cost_nano_usd": self.cost,
            "suspense_nano_usd": self.suspense,
            "standstill_seconds": round(self.standstill[0], 1),
            "invariants": {
                finding.invariant: {"checks": finding.checks, "violations": len(finding.violations)}
                for finding in self.findings
            },
        }


def show(report: Report, screen: Screen) -> None:
    """Print the table, the sums, and the first violations of each invariant."""
    widest = max(len(finding.claim) for finding in report.findings)
    screen.show(f"\n{'':4} {'invariant':{widest}} {'checks':>10} {'violations':>11}")
    for finding in report.findings:
        line = f"{finding.invariant:4} {finding.claim:{widest}}"
        screen.show(f"{line} {finding.checks:>10,} {len(finding.violations):>11,}")
    screen.show(
        f"\n{report.jobs:,} jobs, {report.calls:,} calls, {report.callbacks:,} callbacks, "
        f"{report.faults} faults of {report.kinds} kinds, "
        f"cost {format_usd(report.cost)}, suspense {format_usd(report.suspense)}"
    )
    lines, dials = report.busiest
    screen.show(f"the busiest worker: {lines} log lines and {dials} new connections in ten seconds")
    seconds, until = report.standstill
    screen.show(f"the longest standstill: {seconds:.0f} s, until {until // 60:.0f}:{until % 60:02.0f}")
    for finding in report.findings:
        for violation in finding.violations[:_SHOWN]:
            screen.show(f"{finding.invariant}: {violation}")
        if len(finding.violations) > _SHOWN:
            screen.show(f"{finding.invariant}: and {len(finding.violations) - _SHOWN:,} more")
