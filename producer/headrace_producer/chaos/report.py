"""A run's last words: a table for people, an object for machines."""

from collections.abc import Sequence
from dataclasses import dataclass

from headrace_producer.chaos.auditor import Finding, Verdict
from headrace_producer.chaos.screen import Screen
from headrace_shared.money import NanoUSD, format_usd

_SHOWN = 5
_TOLERATED = 0.25
"""The share of faults that may turn out impossible, because another one was in the way."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a run came to."""

    seed: int
    minutes: float
    done: Sequence[str]
    """The names of the faults that were carried out."""
    not_done: Sequence[str]
    """Faults that could not be carried out, in words."""
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
        return not self.gaps and not any(finding.violations for finding in self.findings)

    @property
    def gaps(self) -> list[str]:
        """Say why the run proves nothing, whatever was found."""
        gaps: list[str] = []
        if not self.jobs:
            gaps.append("no job was accepted")
        if not self.done:
            gaps.append("no fault was done")
        elif len(self.not_done) > _TOLERATED * (len(self.done) + len(self.not_done)):
            gaps.append(f"{len(self.not_done)} faults could not be done, and only {len(self.done)} were")
        return gaps

    def as_json(self) -> dict[str, object]:
        """Return it as an object; amounts are nano-USD."""
        return {
            "seed": self.seed,
            "minutes": self.minutes,
            "good": self.good,
            "done": len(self.done),
            "not_done": len(self.not_done),
            "jobs": self.jobs,
            "calls": self.calls,
            "callbacks": self.callbacks,
            "cost_nano_usd": self.cost,
            "suspense_nano_usd": self.suspense,
            "standstill_seconds": round(self.standstill[0], 1),
            "invariants": {
                finding.invariant: {
                    "checks": finding.checks,
                    "violations": len(finding.violations),
                    "verdict": finding.verdict,
                }
                for finding in self.findings
            },
        }


def show(report: Report, screen: Screen) -> None:
    """Print the table, the sums, the first violations of each invariant, and what was not done."""
    _show_findings(report.findings, screen)
    screen.show(
        f"\n{report.jobs:,} jobs, {report.calls:,} calls, {report.callbacks:,} callbacks, "
        f"{len(report.done)} faults of {len(set(report.done))} kinds, {len(report.not_done)} not done, "
        f"cost {format_usd(report.cost)}, suspense {format_usd(report.suspense)}"
    )
    lines, dials = report.busiest
    screen.show(f"the busiest worker: {lines} log lines and {dials} new connections in ten seconds")
    seconds, until = report.standstill
    screen.show(f"the longest standstill: {seconds:.0f} s, until {until // 60:.0f}:{until % 60:02.0f}")
    for finding in report.findings:
        _show_first(finding.invariant, finding.violations, screen)
    _show_first("not done", report.not_done, screen)
    for gap in report.gaps:
        screen.show(f"this run proves nothing: {gap}")


def _show_findings(findings: Sequence[Finding], screen: Screen) -> None:
    widest = max(len(finding.claim) for finding in findings)
    screen.show(f"\n{'':4} {'invariant':{widest}} {'checks':>10} {'violations':>11}")
    for finding in findings:
        checked = finding.verdict is not Verdict.NOT_CHECKED
        found = f"{len(finding.violations):,}" if checked else finding.verdict
        screen.show(f"{finding.invariant:4} {finding.claim:{widest}} {finding.checks:>10,} {found:>11}")


def _show_first(what: str, sentences: Sequence[str], screen: Screen) -> None:
    for sentence in sentences[:_SHOWN]:
        screen.show(f"{what}: {sentence}")
    if len(sentences) > _SHOWN:
        screen.show(f"{what}: and {len(sentences) - _SHOWN:,} more")
