"""`headrace budgets`: what is used, and what becomes of it at the pace of late."""

from datetime import UTC, datetime, timedelta
from typing import cast

import pytest
from command_line import Command

from headrace_shared.budgets import Budgets
from headrace_shared.forecast import Forecast, follow, forecast
from headrace_shared.ids import WorkerId
from headrace_shared.money import NanoUSD
from headrace_shared.settings import Settings
from headrace_shared.store.money import BudgetPolicy, BudgetState, WindowKind
from headrace_shared.store.pool import Pool
from headrace_shared.testing.clock import Clock
from headrace_shared.testing.spending import Spender
from headrace_workers.alerts import BudgetAlerts
from headrace_workers.configured import Configured
from headrace_workers.telemetry import setup

DAY, HOUR, MINUTE = timedelta(days=1), timedelta(hours=1), timedelta(minutes=1)
NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)
DOLLAR = 10**9


def state(
    used: int, limit: int = 100_000, kind: WindowKind = WindowKind.DAY, name: str = "day:1"
) -> BudgetState:
    return BudgetState("global", kind, name, NanoUSD(limit), BudgetPolicy.WAIT, NanoUSD(used), NanoUSD(0))


def spent(*amounts: int, ends_in: timedelta | None = None, every: timedelta = MINUTE) -> Forecast:
    """Spend so much in each minute; say what is to be expected after the last."""
    pace, now, used = follow(None, state(0), NOON), NOON, 0
    for amount in amounts:
        now, used = now + every, used + amount
        pace = follow(pace, state(used), now)
    return forecast(pace, state(used), ends_in)


def test_the_pace_is_that_of_late() -> None:
    assert spent(*[10] * 5).per_hour == 600
    steady = spent(*[10] * 600, ends_in=DAY / 2)
    assert (steady.per_hour, steady.used_at_end, steady.observed) == (600, 6000 + 7200, 10 * HOUR)
    assert spent(*[10] * 600, *[40] * 240).per_hour == pytest.approx(2400, rel=0.02)
    assert spent(*[10] * 600, *[0] * 600).per_hour < 1
    assert 600 < spent(*[10] * 600, *[40] * 30).per_hour < 2400


def test_how_often_somebody_looks_makes_no_difference() -> None:
    often = spent(*[10] * 300)
    seldom = spent(*[100] * 30, every=10 * MINUTE)
    assert often.per_hour == pytest.approx(seldom.per_hour, rel=0.01)


def test_a_budget_is_spent_before_its_window_ends_or_lasts() -> None:
    pace = follow(follow(None, state(0), NOON), state(1000), NOON + HOUR)
    assert forecast(pace, state(1000, 5000), 8 * HOUR).exhausted_in == 4 * HOUR
    assert forecast(pace, state(1000, 5000), 3 * HOUR).exhausted_in is None
    assert forecast(pace, state(1000, 5000), None).exhausted_in == 4 * HOUR
    assert forecast(pace, state(1000, 1000), 3 * HOUR).exhausted_in == timedelta(0)
    assert forecast(pace, state(1000, 10**15), None).exhausted_in is None


def test_money_that_comes_back_is_no_pace() -> None:
    pace = follow(follow(None, state(1000), NOON), state(0), NOON + HOUR)
    found = forecast(pace, state(0), HOUR)
    assert (found.per_hour, found.exhausted_in, found.used_at_end) == (0, None, 0)


def test_a_new_window_goes_on_at_the_pace_of_the_old_one() -> None:
    pace = follow(follow(None, state(0), NOON), state(6000), NOON + HOUR)
    turned = state(100, name="day:2")
    pace = follow(pace, turned, NOON + HOUR + MINUTE)
    assert forecast(pace, turned, HOUR).per_hour == pytest.approx(6000, rel=0.02)


@pytest.fixture
async def spender(pool: Pool, clock: Clock) -> Spender:
    """At noon of a day of next month."""
    now = datetime.now(UTC)
    middle = (now.replace(day=1) + 32 * DAY).replace(day=15, hour=12, minute=0, second=0, microsecond=0)
    await clock.advance(middle - now)
    return await Spender.start(pool)


async def test_every_budget_is_shown_with_its_forecast(
    *, spender: Spender, pool: Pool, budgets: Budgets, clock: Clock, environment: None, command: Command
) -> None:
    watcher = BudgetAlerts(pool, await Configured.load(pool), setup(Settings(), WorkerId("w1")).metrics)
    for scope, kind, dollars in [
        ("global", WindowKind.TOTAL, 100),
        ("tenant:acme", WindowKind.DAY, 4),
        ("tenant:other", WindowKind.DAY, 1),
    ]:
        await budgets.set(scope, kind, NanoUSD(dollars * DOLLAR), BudgetPolicy.WAIT)
    told = (await command("budgets")).out
    assert "not watched yet" in told
    await watcher.turn()
    for _ in range(2):
        await clock.advance(HOUR)
        call = await spender.open(budgets, DOLLAR // 2, "global", "tenant:acme")
        await budgets.settle([await spender.conclude(call, cost=DOLLAR // 2)])
        await watcher.turn()
    await spender.open(budgets, 7, "global", "tenant:acme")
    everything, acme, other = (await command("budgets", "--json")).rows("budgets")
    assert (await command("budgets", "show", "--json")).rows("budgets")[1]["scope"] == acme["scope"]
    amounts = {name: value for name, value in acme.items() if name.endswith("_nano_usd")}
    assert amounts == {
        "limit_nano_usd": 4 * DOLLAR,
        "settled_nano_usd": DOLLAR,
        "held_nano_usd": 7,
        "suspense_nano_usd": 0,
        "remaining_nano_usd": 3 * DOLLAR - 7,
    }
    ahead = cast("dict[str, object]", acme["forecast"])
    assert ahead["pace_nano_usd_per_hour"] == pytest.approx(DOLLAR / 2, rel=0.01)
    assert ahead["used_at_end_nano_usd"] == pytest.approx(6 * DOLLAR, rel=0.01)
    assert all(isinstance(ahead[name], int) for name in ("pace_nano_usd_per_hour", "used_at_end_nano_usd"))
    ends_at = datetime.fromisoformat(str(acme["window_ends_at"]))
    exhausted_at = datetime.fromisoformat(str(ahead["exhausted_at"]))
    assert (ends_at - exhausted_at) / HOUR == pytest.approx(4, abs=0.1)
    assert [one["level"] for one in cast("list[dict[str, object]]", acme["alerts"])] == ["projected"]
    assert (everything["window_ends_at"], everything["alerts"]) == (None, [])
    assert cast("dict[str, object]", other["forecast"])["exhausted_at"] is None
    told = (await command("budgets")).out
    assert "spent in 5 h 59 min" in told or "spent in 6 h" in told
    assert "$0.00 at its end" in told
    assert "at the pace of late" in told
    assert f"{ends_at:%Y-%m-%d} 00:00 UTC" in told


async def test_a_limit_that_is_used_already_is_said_to_be(
    spender: Spender, budgets: Budgets, environment: None, command: Command
) -> None:
    await budgets.set("tenant:acme", WindowKind.TOTAL, NanoUSD(4 * DOLLAR), BudgetPolicy.WAIT)
    call = await spender.open(budgets, DOLLAR, "tenant:acme")
    await budgets.settle([await spender.conclude(call, cost=DOLLAR)])
    said = (await command("budgets", "set", "tenant:acme", "--limit", "2")).out
    assert "used already" not in said
    assert "ever charged" not in said
    assert "fails, once no call under way can still make room for it, because a total never" in said
    said = (await command("budgets", "set", "tenant:acme", "--limit", "1", "--policy", "reject")).out
    assert "a job that does not fit fails, once no call under way can still make room for it." in said
    assert "used already ($1.00 is settled): no call that costs anything goes out under it.\n" in said
    said = (await command("budgets", "set", "tenant:acme", "--limit", "0", "--window", "day")).out
    assert "waits for the next day, and fails if its call alone can cost more than the limit." in said
    assert said.endswith("goes out under it before the next day.\n")
    said = (await command("budgets", "set", "tenant:acme", "--limit", "0", "--policy", "soft")).out
    assert said.endswith("used already ($1.00 is settled), and calls go on.\n")


async def test_a_budget_of_a_name_that_was_never_charged_says_so(environment: None, command: Command) -> None:
    for scope in ("tenant:amce", "tag:nightly"):
        done = await command("budgets", "set", scope, "--limit", "1")
        assert done.code == 0
        assert done.out.endswith(
            f"Nothing was ever charged to {scope}: it counts from the first call that is.\n"
        )
    assert "charged" not in (await command("budgets", "set", "global", "--limit", "1")).out


async def test_a_budget_of_a_model_that_is_named_with_its_provider_says_how_jobs_name_it(
    environment: None, command: Command
) -> None:
    said = (await command("budgets", "set", "model:openai/gpt-4o-mini", "--limit", "1")).out
    assert said.endswith("without its provider: if that is meant, set model:gpt-4o-mini.\n")
    assert "provider" not in (await command("budgets", "set", "model:gpt-4o-mini", "--limit", "1")).out
