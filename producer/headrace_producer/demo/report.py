"""The demo's last words: a table for people, an object for machines."""

from datetime import timedelta

from rich.table import Table

from headrace_producer.demo.ledger import Latency
from headrace_producer.demo.verdict import Claim, Facts
from headrace_shared.money import format_usd


def table_of(facts: Facts) -> Table:
    """Return what the run came to."""
    now, totals = facts.now, facts.totals
    rate = now.ended / totals.duration.total_seconds() if totals.duration else 0.0
    rows = [
        ("jobs", f"{now.succeeded:,} of {now.total:,} succeeded, {now.failed} failed"),
        ("attempts", f"{totals.attempts:,}, {now.retried} of them retried; {totals.crashes} runs crashed"),
        ("provider calls", f"{totals.calls:,}"),
        ("duration", f"{totals.duration.total_seconds():.1f} s, {rate:.0f} jobs/s"),
        ("job, enqueued to end", _latency(totals.jobs)),
        ("provider call", _latency(totals.provider)),
        ("tokens", f"{now.prompt_tokens:,} in, {now.completion_tokens:,} out"),
        ("cost", f"{format_usd(now.cost)} of {format_usd(facts.limit)} budget"),
        (
            "suspense",
            f"{format_usd(now.suspense)} for {totals.in_suspense} calls that died with their worker",
        ),
        ("provider's books", "not readable" if facts.books is None else format_usd(facts.books)),
        ("webhooks", f"{len(facts.callbacks.jobs):,} verified, {facts.callbacks.duplicates} duplicates"),
    ]
    table = Table(show_header=False, title="What it came to", title_justify="left")
    for name, value in rows:
        table.add_row(name, value)
    return table


def judgement_of(claims: list[Claim]) -> Table:
    """Return the claims, with what each is based on."""
    table = Table(show_header=False, title="What was promised", title_justify="left")
    for claim in claims:
        verdict = "[green]true[/]" if claim.holds else "[bold red]NOT TRUE[/]"
        table.add_row(verdict, claim.text, claim.detail)
    return table


def as_json(facts: Facts, claims: list[Claim], provider: str, seconds: float) -> dict[str, object]:
    """Return the same as an object; amounts are nano-USD, times are seconds."""
    now, totals, crash = facts.now, facts.totals, facts.crash
    return {
        "ok": all(claim.holds for claim in claims),
        "provider": provider,
        "jobs": now.total,
        "succeeded": now.succeeded,
        "failed": now.failed,
        "attempts": totals.attempts,
        "retried": now.retried,
        "crashes": totals.crashes,
        "calls": totals.calls,
        "prompt_tokens": now.prompt_tokens,
        "completion_tokens": now.completion_tokens,
        "cost_nano_usd": now.cost,
        "suspense_nano_usd": now.suspense,
        "held_nano_usd": facts.held,
        "budget_nano_usd": facts.limit,
        "books_nano_usd": facts.books,
        "job_p50_seconds": _seconds(totals.jobs.p50),
        "job_p95_seconds": _seconds(totals.jobs.p95),
        "call_p50_seconds": _seconds(totals.provider.p50),
        "call_p95_seconds": _seconds(totals.provider.p95),
        "webhooks_verified": len(facts.callbacks.jobs),
        "webhooks_duplicate": facts.callbacks.duplicates,
        "breakers_opened": facts.outage.opened if facts.outage else None,
        "killed_pid": crash.pid if crash else None,
        "killed_held": len(crash.holding.jobs) if crash else None,
        "recovered_after_seconds": _seconds(crash.returned_after) if crash and crash.returned_after else None,
        "seconds": round(seconds, 3),
        "claims": [{"claim": claim.text, "holds": claim.holds, "detail": claim.detail} for claim in claims],
    }


def _latency(latency: Latency) -> str:
    return f"p50 {_seconds(latency.p50)} s, p95 {_seconds(latency.p95)} s"


def _seconds(duration: timedelta) -> float:
    return round(duration.total_seconds(), 3)
