"""What the demo claims, each checked against what really happened."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from uuid import UUID

from headrace_producer.demo.disturbances import Crash, Outage
from headrace_producer.demo.ledger import Progress, Totals
from headrace_shared.money import NanoUSD, format_usd
from headrace_shared.testing.webhook_receiver import WebhookReceiver


@dataclass(frozen=True, slots=True)
class Claim:
    text: str
    holds: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Callbacks:
    """What the receivers of all tenants were sent."""

    jobs: frozenset[UUID]
    """Jobs whose callback came and was verified."""
    duplicates: int
    rejected: int


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that was found out about a run."""

    enqueued: frozenset[UUID]
    now: Progress
    totals: Totals
    limit: NanoUSD
    """The sum of the tenants' limits."""
    over_budget: int
    held: NanoUSD
    callbacks: Callbacks
    books: NanoUSD | None
    """The provider's own bill; None for one whose books nobody can read."""
    outage: Outage | None
    """None when none was to be caused."""
    crash: Crash | None
    crash_planned: bool


def callbacks_of(receivers: Mapping[str, WebhookReceiver]) -> Callbacks:
    """Sum up what the receivers were sent."""
    accepted = [one for receiver in receivers.values() for one in receiver.accepted]
    rejected = sum(one.rejected is not None for receiver in receivers.values() for one in receiver.deliveries)
    jobs = frozenset(_job_of(one.body) for one in accepted)
    return Callbacks(jobs, len(accepted) - len(jobs), rejected)


def claims_of(facts: Facts) -> list[Claim]:
    """Judge a run; it is good when every claim holds."""
    claims = [_all_succeeded(facts), _callbacks(facts), _budget(facts)]
    if facts.books is not None:
        claims.append(_books(facts, facts.books))
    if facts.outage is not None:
        claims.append(_outage(facts.outage))
    if facts.crash_planned:
        claims += [_recovered(facts), _suspense(facts)]
    return claims


def _job_of(body: bytes) -> UUID:
    return UUID(json.loads(body)["data"]["id"])


def _all_succeeded(facts: Facts) -> Claim:
    now = facts.now
    lost = len(facts.enqueued) - now.ended
    return Claim(
        "every job succeeded, none was lost",
        lost == 0 and now.failed == 0 and now.succeeded == len(facts.enqueued) and facts.totals.open == 0,
        f"{now.succeeded:,} succeeded, {now.failed} failed, {lost} lost",
    )


def _callbacks(facts: Facts) -> Claim:
    callbacks = facts.callbacks
    return Claim(
        "every job's webhook was delivered and its signature verified",
        callbacks.jobs == facts.enqueued and callbacks.rejected == 0,
        f"{len(callbacks.jobs):,} jobs, {callbacks.duplicates} duplicates, {callbacks.rejected} rejected",
    )


def _budget(facts: Facts) -> Claim:
    spent = NanoUSD(facts.now.cost + facts.now.suspense)
    return Claim(
        "no budget was exceeded at any look, and nothing is held any more",
        facts.over_budget == 0 and facts.held == 0 and spent <= facts.limit,
        f"{format_usd(spent)} of {format_usd(facts.limit)}, {format_usd(facts.held)} held",
    )


def _books(facts: Facts, books: NanoUSD) -> Claim:
    ledger, suspense = facts.now.cost, facts.now.suspense
    return Claim(
        "the ledger is the bill: ledger <= provider's books <= ledger + suspense",
        ledger <= books <= ledger + suspense,
        f"{format_usd(ledger)} <= {format_usd(books)} <= {format_usd(NanoUSD(ledger + suspense))}",
    )


def _outage(outage: Outage) -> Claim:
    return Claim(
        "the breakers opened in the outage and closed after it",
        outage.opened > 0 and outage.opened == outage.closed,
        f"{outage.opened} opened, {outage.closed} closed",
    )


def _recovered(facts: Facts) -> Claim:
    crash = facts.crash
    if crash is None:
        return Claim("the jobs of the killed worker came back", holds=False, detail="no worker was killed")
    held, after = len(crash.holding.jobs), crash.returned_after
    return Claim(
        "the jobs of the killed worker came back",
        held > 0 and after is not None and facts.totals.crashes == held,
        f"{crash.returned} of {held}" + (f" after {after.total_seconds():.1f} s" if after else ""),
    )


def _suspense(facts: Facts) -> Claim:
    open_calls, worst = (facts.crash.holding.open_calls, facts.crash.holding.held) if facts.crash else (0, 0)
    return Claim(
        "suspense is exactly the open calls of the killed worker, at their worst case",
        (facts.totals.in_suspense, facts.now.suspense) == (open_calls, worst),
        f"{facts.totals.in_suspense} calls, {format_usd(facts.now.suspense)}; "
        f"it had {open_calls} open, {format_usd(NanoUSD(worst))}",
    )
