"""Says how far budgets are used: at 50, 80, 95 and 100 %, and when they will not last for their window.

Each is said once for a budget and window, as a log line, in a metric, and as an event to `alerts.url`, which
goes the way of callbacks. What is said follows the ledger: settled and in suspense, without holds, which are
upper bounds and come back. A hard budget is spent before its last nano-dollar is, because the next hold does
not fit: from 95 % on, a call that did not fit for good counts as 100 %.

A limit that is raised takes back the alerts whose level is not reached under it; they are said again when it
is. What is reached still is not repeated, and money that comes back out of suspense takes back nothing.
"""

import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from headrace_shared.forecast import Forecast, Pace, follow, forecast, is_enough, used
from headrace_shared.ids import DeliveryId, uuid7
from headrace_shared.money import format_usd
from headrace_shared.store import alerts, money
from headrace_shared.store.alerts import AlertLevel, NewAlert, Watched
from headrace_shared.store.money import BudgetState, Refused, WindowKind
from headrace_shared.store.pool import Database
from headrace_workers.configured import Configured
from headrace_workers.telemetry import Metrics

_logger = logging.getLogger(__name__)

INTERVAL = timedelta(seconds=5)
"""Between two looks at the budgets."""

_DUTY = 20
"""A look that takes long is followed by a pause of this many times as long, at least."""

_PERCENT = {AlertLevel.HALF: 50, AlertLevel.MOST: 80, AlertLevel.NEARLY: 95, AlertLevel.ALL: 100}

REFUSAL_INTERVAL = timedelta(seconds=5)
"""How often one process notes that a budget refuses calls."""


class BudgetAlerts:
    """Looks at the budgets; one process of the fleet at a time does it."""

    def __init__(self, database: Database, configured: Configured, metrics: Metrics) -> None:
        self._database = database
        self._configured = configured
        self._metrics = metrics

    async def turn(self) -> timedelta:
        """Look once at every budget, and say what was not said yet."""
        began = time.monotonic()
        looks = await self._look()
        if looks:
            await self._say(looks)
        return max(INTERVAL, _DUTY * timedelta(seconds=time.monotonic() - began))

    async def _look(self) -> "list[_Look]":
        states = await money.budget_state(self._database)
        watched = await alerts.watched(self._database)
        looks = [_look(state, known) for state in states if (known := watched.get((state.scope, state.kind)))]
        paces = [(look.state.scope, look.state.kind, look.pace) for look in looks]
        await alerts.keep_paces(self._database, paces)
        return looks

    async def _say(self, looks: "Sequence[_Look]") -> None:
        said = {
            (one.scope, one.kind, one.window, one.level): one.limit
            for one in await alerts.said(self._database, [look.state for look in looks])
        }
        new: list[tuple[_Look, AlertLevel]] = []
        taken_back: list[tuple[BudgetState, AlertLevel]] = []
        for look in looks:
            for level in AlertLevel:
                limit = said.get(_key(look.state, level))
                if limit is None and level in look.reached:
                    new.append((look, level))
                elif limit is not None and level not in look.reached and limit < look.state.limit:
                    taken_back.append((look.state, level))
        if taken_back:
            await alerts.take_back(self._database, taken_back)
        if new:
            await self._announce(new)

    async def _announce(self, new: "Sequence[tuple[_Look, AlertLevel]]") -> None:
        url = self._configured.now.configuration.alerts.url
        written = await alerts.say(self._database, [_alert(look, level) for look, level in new], url)
        # Who lost the race for a row has nothing to say.
        for look, level in new:
            state = look.state
            if _key(state, level) not in written:
                continue
            self._metrics.budget_alert(state.scope, state.kind, level)
            _logger.warning(
                "%s",
                _sentence(look, level),
                extra={"scope": state.scope, "window": state.window, "level": level.value},
            )


class Refusals:
    """Notes which budgets have no room left, each once in a while."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._noted: dict[tuple[str, WindowKind], float] = {}

    async def note(self, refused: Refused) -> None:
        """Note that a call did not fit into a budget although nothing was held that could be released."""
        key, now = (refused.scope, refused.kind), time.monotonic()
        if now - self._noted.get(key, -REFUSAL_INTERVAL.total_seconds()) < REFUSAL_INTERVAL.total_seconds():
            return
        if len(self._noted) > _KEPT:
            self._noted.clear()
        self._noted[key] = now
        await alerts.refuse(self._database, refused)


_KEPT = 1000


@dataclass(frozen=True, slots=True)
class _Look:
    """A budget as it was found, and what there is to say about it."""

    state: BudgetState
    pace: Pace
    now: datetime
    forecast: Forecast
    reached: frozenset[AlertLevel]


def _look(state: BudgetState, known: Watched) -> _Look:
    pace = follow(known.pace, state, known.now)
    expected = forecast(pace, state, known.ends_in)
    reached = frozenset(_reached(state, known, expected))
    return _Look(state, pace, known.now, expected, reached)


def _reached(state: BudgetState, known: Watched, expected: Forecast) -> Iterator[AlertLevel]:
    if not state.limit:
        return  # nothing may be spent, and nobody expects anything else
    share = used(state) * 100
    for level, percent in _PERCENT.items():
        if share >= percent * state.limit:
            yield level
    if known.refused and _PERCENT[AlertLevel.NEARLY] * state.limit <= share < 100 * state.limit:
        yield AlertLevel.ALL
    # A window that never ends is always used up at some time: that is no news.
    if known.ends_in is not None and expected.exhausted_in and is_enough(state.kind, expected):
        yield AlertLevel.PROJECTED


def _key(state: BudgetState, level: AlertLevel) -> tuple[str, WindowKind, str, AlertLevel]:
    return state.scope, state.kind, state.window, level


def _alert(look: _Look, level: AlertLevel) -> NewAlert:
    projected = level is AlertLevel.PROJECTED
    event = "budget.exhaustion_projected" if projected else "budget.threshold_reached"
    return NewAlert(look.state, level, DeliveryId(uuid7()), event, _payload(look, level, event))


def _payload(look: _Look, level: AlertLevel, event: str) -> str:
    state = look.state
    data: dict[str, object] = {
        "scope": state.scope,
        "window": state.kind,
        "window_name": state.window,
        "policy": state.policy,
        "limit_nano_usd": state.limit,
        "settled_nano_usd": state.settled,
        "suspense_nano_usd": state.suspense,
    }
    if level is AlertLevel.PROJECTED:
        exhausted_at = look.now + (look.forecast.exhausted_in or timedelta(0))
        data["exhausted_at"] = _moment(exhausted_at)
        data["pace_nano_usd_per_hour"] = look.forecast.per_hour
    else:
        data["threshold_percent"] = _PERCENT[level]
    return json.dumps({"type": event, "timestamp": _moment(look.now), "data": data})


def _moment(moment: datetime) -> str:
    return f"{moment:%Y-%m-%dT%H:%M:%S.%fZ}"


def _sentence(look: _Look, level: AlertLevel) -> str:
    state = look.state
    whose = f"the {state.kind} budget of {state.scope}"
    of = f"{format_usd(used(state))} of {format_usd(state.limit)}"
    if level is AlertLevel.PROJECTED:
        at = look.now + (look.forecast.exhausted_in or timedelta(0))
        pace = f"{format_usd(look.forecast.per_hour)} an hour"
        return f"{whose} ({state.window}) will be spent at {at:%Y-%m-%d %H:%M} UTC, at {pace}: {of} are used"
    return f"{whose} ({state.window}) has reached {level} %: {of} are used"
