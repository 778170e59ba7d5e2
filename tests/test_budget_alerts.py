"""How far a budget is used is said once for each level and window, and so is that it will not last."""

import asyncio
import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import cast

import pytest
from command_line import Command
from prometheus_client import generate_latest

from headrace_shared import webhooks
from headrace_shared.budgets import Budgets
from headrace_shared.dispatch.dispatch import Dispatch
from headrace_shared.ids import WorkerId
from headrace_shared.money import NanoUSD
from headrace_shared.settings import Settings
from headrace_shared.store import alerts, money
from headrace_shared.store.money import BudgetPolicy, Refused, WindowKind
from headrace_shared.store.pool import Pool
from headrace_shared.testing.clock import Clock
from headrace_shared.testing.jobs import Jobs, eventually
from headrace_shared.testing.scripted_provider import ScriptedProvider
from headrace_shared.testing.spending import Spender
from headrace_shared.testing.webhook_receiver import WebhookReceiver
from headrace_workers import alerts as alerts_module
from headrace_workers.alerts import BudgetAlerts, Refusals
from headrace_workers.configured import Configured
from headrace_workers.reaper import Reaper
from headrace_workers.telemetry import Telemetry, setup
from headrace_workers.testing import running_worker

pytestmark = pytest.mark.conformance

DAY, MINUTE = timedelta(days=1), timedelta(minutes=1)
ACME = "tenant:acme"
URL = "https://example.com/alerts"


@pytest.fixture
async def spender(pool: Pool, clock: Clock) -> Spender:
    """At noon in the middle of next month, far from the turn of any window."""
    now = datetime.now(UTC)
    middle = (now.replace(day=1) + 32 * DAY).replace(day=15, hour=12, minute=0, second=0, microsecond=0)
    await clock.advance(middle - now)
    return await Spender.start(pool)


@pytest.fixture
def telemetry() -> Telemetry:
    return setup(Settings(metrics_port=0), WorkerId("w1"))


@pytest.fixture
async def watcher(pool: Pool, dispatch: Dispatch, telemetry: Telemetry) -> BudgetAlerts:
    await Jobs(pool, dispatch).configure({"alerts": {"url": URL}})
    return BudgetAlerts(pool, await Configured.load(pool), telemetry.metrics)


async def limit(budgets: Budgets, amount: int, kind: WindowKind = WindowKind.DAY, scope: str = ACME) -> None:
    await budgets.set(scope, kind, NanoUSD(amount), BudgetPolicy.WAIT)


async def spend(spender: Spender, budgets: Budgets, cost: int, scope: str = ACME) -> None:
    call = await spender.open(budgets, cost, scope)
    await budgets.settle([await spender.conclude(call, cost=cost)])


async def events(pool: Pool) -> list[Mapping[str, object]]:
    """What is in the outbox, in the order of its making."""
    rows = await pool.fetch(
        "SELECT event_type, payload, url FROM headrace.deliveries ORDER BY created_at, id"
    )
    found = [json.loads(row["payload"]) for row in rows]
    assert [row["event_type"] for row in rows] == [event["type"] for event in found]
    assert {row["url"] for row in rows} <= {URL}
    return [event["data"] for event in found]


async def thresholds(pool: Pool) -> list[object]:
    return [event.get("threshold_percent", "projected") for event in await events(pool)]


async def test_each_level_is_said_once_however_often_and_by_how_many_it_is_found(
    *,
    spender: Spender,
    pool: Pool,
    budgets: Budgets,
    watcher: BudgetAlerts,
    telemetry: Telemetry,
    caplog: pytest.LogCaptureFixture,
) -> None:
    await limit(budgets, 1000)
    caplog.set_level(logging.WARNING, logger=alerts_module.__name__)
    expected: list[object] = []
    for cost, reached in [
        (499, []),
        (1, [50]),
        (299, []),
        (1, [80]),
        (149, []),
        (1, [95]),
        (49, []),
        (1, [100]),
    ]:
        await spend(spender, budgets, cost)
        await asyncio.gather(*(watcher.turn() for _ in range(3)))
        expected += reached
        assert await thresholds(pool) == expected
    assert len(caplog.records) == 4
    assert "the day budget of tenant:acme" in caplog.records[1].message
    assert "has reached 80 %: $0.0000008 of $0.000001 are used" in caplog.records[1].message
    assert telemetry.registry is not None
    page = generate_latest(telemetry.registry).decode()
    for level in (50, 80, 95, 100):
        assert f'headrace_budget_alerts_total{{level="{level}",scope="tenant",window="day"}} 1.0' in page


async def test_an_alert_has_the_amounts_of_its_window(
    spender: Spender, pool: Pool, budgets: Budgets, watcher: BudgetAlerts
) -> None:
    await limit(budgets, 100)
    await spend(spender, budgets, 40)
    await spender.conclude(await spender.open(budgets, 15, ACME), suspense=15)
    await spender.open(budgets, 45, ACME)
    await watcher.turn()
    (state,) = await money.budget_state(pool)
    assert await events(pool) == [
        {
            "scope": ACME,
            "window": "day",
            "window_name": state.window,
            "policy": "wait",
            "limit_nano_usd": 100,
            "settled_nano_usd": 40,
            "suspense_nano_usd": 15,
            "threshold_percent": 50,
        }
    ]


async def test_levels_that_are_passed_together_are_all_said(
    spender: Spender, pool: Pool, budgets: Budgets, watcher: BudgetAlerts
) -> None:
    await limit(budgets, 100)
    await spend(spender, budgets, 96)
    await watcher.turn()
    assert sorted(map(str, await thresholds(pool))) == ["50", "80", "95"]


async def test_a_new_window_is_a_new_matter(
    spender: Spender, pool: Pool, budgets: Budgets, watcher: BudgetAlerts, clock: Clock
) -> None:
    await limit(budgets, 100)
    await limit(budgets, 100, WindowKind.TOTAL)
    for said in ([50, 50], [50, 50, 50, 80, 95, 100]):
        await spend(spender, budgets, 50)
        for _ in range(2):
            await watcher.turn()
        assert sorted(await thresholds(pool), key=str) == sorted(said, key=str)
        await clock.advance(DAY)


async def test_a_raised_limit_takes_back_what_is_not_reached_under_it(
    spender: Spender, pool: Pool, budgets: Budgets, watcher: BudgetAlerts
) -> None:
    await limit(budgets, 100)
    await spend(spender, budgets, 80)
    await watcher.turn()
    await limit(budgets, 150)
    for _ in range(2):
        await watcher.turn()
    assert sorted(map(str, await thresholds(pool))) == ["50", "80"], "53 % of the new limit: 50 is said"
    await spend(spender, budgets, 40)
    for _ in range(2):
        await watcher.turn()
    assert sorted(map(str, await thresholds(pool))) == ["50", "80", "80"]
    await limit(budgets, 130)
    await watcher.turn()
    assert len(await events(pool)) == 3, "92 % of the lower limit: nothing new"


async def test_money_that_comes_back_takes_back_nothing(
    spender: Spender, pool: Pool, budgets: Budgets, watcher: BudgetAlerts
) -> None:
    await limit(budgets, 100)
    for _ in range(2):
        call = await spender.open(budgets, 60, ACME)
        await budgets.settle([await spender.conclude(call, suspense=60)])
        await watcher.turn()
        await pool.execute("UPDATE headrace.spend SET suspense_nano = 0")
        await budgets.rebuild()
        await watcher.turn()
    assert await thresholds(pool) == [50]


async def test_a_call_that_no_longer_fits_has_spent_a_budget_that_is_nearly_spent(
    spender: Spender, pool: Pool, budgets: Budgets, watcher: BudgetAlerts
) -> None:
    await limit(budgets, 100)
    await spend(spender, budgets, 90)
    refused = await spender.refused(budgets, 30, ACME)
    assert isinstance(refused, Refused)
    await Refusals(pool).note(refused)
    await watcher.turn()
    assert 100 not in await thresholds(pool), "a smaller call may go on"
    await spend(spender, budgets, 6)
    await watcher.turn()
    assert sorted(map(str, await thresholds(pool))) == ["100", "50", "80", "95"]


async def test_a_refusal_of_the_window_before_says_nothing_of_this_one(
    spender: Spender, pool: Pool, budgets: Budgets, watcher: BudgetAlerts, clock: Clock
) -> None:
    await limit(budgets, 100)
    await Refusals(pool).note(await spender.refused(budgets, 101, ACME))
    await clock.advance(DAY)
    await spend(spender, budgets, 96)
    await watcher.turn()
    assert 100 not in await thresholds(pool)


async def test_a_budget_that_will_not_last_is_announced_with_the_time(
    spender: Spender, pool: Pool, budgets: Budgets, watcher: BudgetAlerts, clock: Clock
) -> None:
    """At noon: 10 a minute are 7,200 by the end of the day, of 6,000."""
    await limit(budgets, 6000)
    await limit(budgets, 6000, WindowKind.TOTAL)
    await watcher.turn()
    for minute in range(1, 31):
        await clock.advance(MINUTE)
        await spend(spender, budgets, 10)
        await watcher.turn()
        assert bool(await events(pool)) is (minute >= 10), "it is watched for ten minutes first"
    (event,) = await events(pool)
    assert event["window"] == "day"
    assert event["pace_nano_usd_per_hour"] == pytest.approx(600, rel=0.02)
    exhausted_at = datetime.fromisoformat(str(event["exhausted_at"]))
    (now,) = {known.now for known in (await alerts.watched(pool)).values()}
    assert (exhausted_at - now) / timedelta(hours=1) == pytest.approx(6000 / 600 - 0.5, rel=0.02)


async def test_a_budget_that_lasts_is_not_announced(
    spender: Spender, pool: Pool, budgets: Budgets, watcher: BudgetAlerts, clock: Clock
) -> None:
    await limit(budgets, 7400)
    for _ in range(30):
        await watcher.turn()
        await clock.advance(MINUTE)
        await spend(spender, budgets, 10)
    assert await events(pool) == []


async def test_without_an_address_it_is_said_and_nobody_is_called(
    spender: Spender, pool: Pool, budgets: Budgets, telemetry: Telemetry
) -> None:
    watcher = BudgetAlerts(pool, await Configured.load(pool), telemetry.metrics)
    await limit(budgets, 100)
    await spend(spender, budgets, 50)
    await watcher.turn()
    assert await events(pool) == []
    (said,) = await alerts.said(pool, await money.budget_state(pool))
    assert (said.level, said.delivery) == ("50", None)


async def test_what_was_said_is_kept_for_as_long_as_its_window_lasts(
    *, spender: Spender, pool: Pool, budgets: Budgets, watcher: BudgetAlerts, clock: Clock, reaper: Reaper
) -> None:
    await limit(budgets, 100)
    await limit(budgets, 100, WindowKind.TOTAL)
    await spend(spender, budgets, 50)
    await watcher.turn()
    await clock.advance(60 * DAY)
    await reaper.turn()
    await watcher.turn()
    kinds = await pool.fetch("SELECT window_kind FROM headrace.budget_alerts")
    assert [row["window_kind"] for row in kinds] == ["total"]


@pytest.mark.usefixtures("environment", "scripted")
async def test_a_worker_tells_the_configured_receiver_with_a_signature_of_its_own(
    pool: Pool, dispatch: Dispatch, budgets: Budgets, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_WEBHOOK_SECRET", "whsec-master-of-this-test")
    monkeypatch.setenv("HEADRACE_WEBHOOK_ALLOW_HTTP", "true")
    monkeypatch.setenv("HEADRACE_WEBHOOK_ALLOWED_NETWORKS", "127.0.0.0/8")
    monkeypatch.setattr(alerts_module, "INTERVAL", timedelta(milliseconds=20))
    jobs = Jobs(pool, dispatch)
    secret = str((await command("webhooks", "secret", "--alerts", "--json")).answer["secret"])
    async with WebhookReceiver(
        verify=lambda body, headers: webhooks.verify(body, headers, secret)
    ) as receiver:
        await jobs.configure({"alerts": {"url": receiver.url}})
        async with running_worker():
            ids = await jobs.add()
            (ending,) = await jobs.ended(ids)
            await limit(budgets, 2 * ending.bill.cost - 1, scope="global")
            (delivery,) = await receiver.received(1)
            assert delivery.rejected is None
            event = json.loads(delivery.body)
            await eventually(lambda: _states(pool), lambda states: states == ["delivered"])
    assert event["type"] == "budget.threshold_reached"
    assert (event["data"]["scope"], event["data"]["threshold_percent"]) == ("global", 50)
    assert event["data"]["settled_nano_usd"] == ending.bill.cost
    (row,) = (await command("budgets", "--json")).rows("budgets")
    assert [(one["level"], one["delivery"]) for one in cast("list[dict[str, object]]", row["alerts"])] == [
        ("50", "delivered")
    ]


async def _states(pool: Pool) -> list[str]:
    return [row["state"] for row in await pool.fetch("SELECT state FROM headrace.deliveries")]


async def test_a_call_that_a_worker_cannot_make_is_noted(
    pool: Pool,
    dispatch: Dispatch,
    budgets: Budgets,
    scripted: ScriptedProvider,
    environment: None,
) -> None:
    jobs = Jobs(pool, dispatch)
    await limit(budgets, 1, WindowKind.TOTAL, "global")
    async with running_worker():
        await jobs.ended(await jobs.add())
    assert scripted.requests == []
    (row,) = await pool.fetch("SELECT scope, limit_nano FROM headrace.budget_refusals")
    assert tuple(row) == ("global", 1)
