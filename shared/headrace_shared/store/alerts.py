"""What is said about budgets, and the pace they are spent at, as the store has them."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from headrace_shared.forecast import Pace
from headrace_shared.ids import DeliveryId, Tenant
from headrace_shared.money import NanoUSD
from headrace_shared.store.deliveries import DeliveryState
from headrace_shared.store.money import BudgetState, Refused, WindowKind
from headrace_shared.store.pool import Database
from headrace_shared.store.sql import Statements

_SQL = Statements("alerts.sql")

SIGNED_AS = Tenant("headrace alerts")
"""The name that alerts are signed for: no tenant can have it, and so none can forge one."""


class AlertLevel(StrEnum):
    """What an alert says of a window: so many per cent are used, or all of it will be."""

    HALF = "50"
    MOST = "80"
    NEARLY = "95"
    ALL = "100"
    PROJECTED = "projected"


@dataclass(frozen=True, slots=True)
class Watched:
    """What is known of a budget beside its use."""

    scope: str
    kind: WindowKind
    now: datetime
    ends_in: timedelta | None
    """Until the present window ends; None for one that never does."""
    pace: Pace | None
    refused: bool
    """A call did not fit although nothing was held any more that could be released."""


@dataclass(frozen=True, slots=True)
class SaidAlert:
    """An alert, and what came of its delivery."""

    scope: str
    kind: WindowKind
    window: str
    level: AlertLevel
    limit: NanoUSD
    """The limit it was said under."""
    at: datetime
    delivery: DeliveryState | None
    """None: nobody was to be called, or it is no longer kept."""


@dataclass(frozen=True, slots=True)
class NewAlert:
    """An alert that may have to be said."""

    state: BudgetState
    level: AlertLevel
    delivery: DeliveryId
    event_type: str
    payload: str


async def watched(database: Database) -> dict[tuple[str, WindowKind], Watched]:
    """Return every budget's window and pace, by scope and kind."""
    found: dict[tuple[str, WindowKind], Watched] = {}
    for row in await database.fetch(_SQL["watched"]):
        kind = WindowKind(row["window_kind"])
        pace = None
        if row["at"] is not None:
            pace = Pace(
                row["window_name"],
                NanoUSD(row["used_nano"]),
                row["at"],
                row["since"],
                row["rate"],
                row["weight"],
            )
        ends_in = None if row["ends_in"] is None else timedelta(seconds=row["ends_in"])
        found[row["scope"], kind] = Watched(
            row["scope"], kind, row["now"], ends_in, pace, bool(row["refused"])
        )
    return found


async def keep_paces(database: Database, paces: Sequence[tuple[str, WindowKind, Pace]]) -> None:
    """Keep the paces of budgets; those of budgets that are gone go."""
    await database.execute(
        _SQL["keep_paces"],
        [scope for scope, _, _ in paces],
        [kind for _, kind, _ in paces],
        [pace.window for _, _, pace in paces],
        [pace.used for _, _, pace in paces],
        [pace.at for _, _, pace in paces],
        [pace.since for _, _, pace in paces],
        [pace.rate for _, _, pace in paces],
        [pace.weight for _, _, pace in paces],
    )


async def said(database: Database, states: Sequence[BudgetState]) -> list[SaidAlert]:
    """Return what was said about the windows of these budgets, the oldest first."""
    return [
        SaidAlert(
            row["scope"],
            WindowKind(row["window_kind"]),
            row["window_name"],
            AlertLevel(row["level"]),
            NanoUSD(row["limit_nano"]),
            row["said_at"],
            row["delivery"],
        )
        for row in await database.fetch(_SQL["said"], *_windows(states))
    ]


async def say(
    database: Database, alerts: Sequence[NewAlert], url: str | None
) -> set[tuple[str, WindowKind, str, AlertLevel]]:
    """Write alerts down, each with its delivery to `url`; return which had not been said before."""
    rows = await database.fetch(
        _SQL["say"],
        *_windows([alert.state for alert in alerts]),
        [alert.level for alert in alerts],
        [alert.state.limit for alert in alerts],
        [alert.state.settled + alert.state.suspense for alert in alerts],
        [alert.delivery for alert in alerts],
        url,
        [alert.event_type for alert in alerts],
        [alert.payload for alert in alerts],
        SIGNED_AS,
    )
    return {
        (row["scope"], WindowKind(row["window_kind"]), row["window_name"], AlertLevel(row["level"]))
        for row in rows
    }


async def take_back(database: Database, alerts: Sequence[tuple[BudgetState, AlertLevel]]) -> None:
    """Forget alerts of levels that are not reached under a limit that was raised since."""
    states = [state for state, _ in alerts]
    await database.execute(
        _SQL["take_back"],
        *_windows(states),
        [level for _, level in alerts],
        [state.limit for state in states],
    )


async def refuse(database: Database, refused: Refused) -> None:
    """Note that a budget had no room, and nothing held that could make some."""
    seconds = None if refused.ends_in is None else refused.ends_in.total_seconds()
    await database.execute(_SQL["refuse"], refused.scope, refused.kind, refused.limit, seconds)


async def forget_alerts(database: Database, *, older_than: timedelta) -> None:
    """Forget what was said of windows that are over."""
    await database.execute(_SQL["forget_alerts"], older_than.days)


def _windows(states: Sequence[BudgetState]) -> tuple[list[str], list[WindowKind], list[str]]:
    return (
        [state.scope for state in states],
        [state.kind for state in states],
        [state.window for state in states],
    )
