"""What becomes of budgets, as `headrace budgets` tells it: their windows' ends, forecasts, and alerts."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from headrace_producer.console import dollars, in_words
from headrace_shared.forecast import Forecast, follow, forecast
from headrace_shared.store import alerts
from headrace_shared.store.alerts import SaidAlert, Watched
from headrace_shared.store.money import BudgetState
from headrace_shared.store.pool import Database

HOW = (
    "Forecast: at the pace of late, in which older money counts ever less (the last hour, six hours of a "
    "week, a day of a month); without holds."
)


@dataclass(frozen=True, slots=True)
class Prospect:
    """What is known of a budget beside its amounts."""

    known: Watched | None
    """None: it was set or removed in this very moment."""
    forecast: Forecast | None
    """None: no worker has looked at it twice yet."""
    alerts: tuple[SaidAlert, ...]

    @property
    def ends_at(self) -> datetime | None:
        if self.known is None or self.known.ends_in is None:
            return None
        return self.known.now + self.known.ends_in

    @property
    def end_in_words(self) -> str:
        ends_at = self.ends_at
        return "never" if ends_at is None else f"{ends_at:%Y-%m-%d %H:%M} UTC"

    @property
    def in_words(self) -> str:
        found = self.forecast
        if found is None:
            return "not watched yet"
        if found.exhausted_in is not None:
            return f"spent in {in_words(found.exhausted_in)}" if found.exhausted_in else "spent"
        if found.used_at_end is not None:
            return f"{dollars(found.used_at_end)} at its end"
        return "nothing is spent" if not found.per_hour else "lasts for years"

    def as_json(self) -> dict[str, object]:
        ends_at, found = self.ends_at, self.forecast
        told = None
        if found is not None and self.known is not None:
            exhausted_at = None if found.exhausted_in is None else self.known.now + found.exhausted_in
            told = {
                "pace_nano_usd_per_hour": found.per_hour,
                "observed_seconds": round(found.observed.total_seconds()),
                "exhausted_at": None if exhausted_at is None else exhausted_at.isoformat(),
                "used_at_end_nano_usd": found.used_at_end,
            }
        return {
            "window_ends_at": None if ends_at is None else ends_at.isoformat(),
            "forecast": told,
            "alerts": [
                {"level": one.level, "at": one.at.isoformat(), "delivery": one.delivery}
                for one in self.alerts
            ],
        }


async def look_ahead(database: Database, states: Sequence[BudgetState]) -> list[Prospect]:
    """Return the prospects of budgets, in their order; it keeps nothing."""
    watched = await alerts.watched(database)
    said = await alerts.said(database, states)
    return [_prospect(state, watched.get((state.scope, state.kind)), said) for state in states]


def _prospect(state: BudgetState, known: Watched | None, said: Sequence[SaidAlert]) -> Prospect:
    expected = None
    if known is not None and known.pace is not None:
        pace = follow(known.pace, state, known.now)
        expected = forecast(pace, state, known.ends_in) if pace.weight else None
    mine = tuple(
        one for one in said if (one.scope, one.kind, one.window) == (state.scope, state.kind, state.window)
    )
    return Prospect(known, expected, mine)
