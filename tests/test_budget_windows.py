"""Windows of budgets: days, weeks and months of a time zone, through its changes and its own."""

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace_shared.budgets import Budgets
from headrace_shared.dispatch.connection import Redis
from headrace_shared.errors import InvalidInput
from headrace_shared.money import NanoUSD
from headrace_shared.store import money
from headrace_shared.store.money import BudgetPolicy, WindowKind
from headrace_shared.store.pool import Pool
from headrace_shared.testing.clock import Clock
from headrace_shared.testing.spending import Spender, counted

pytestmark = pytest.mark.conformance

SECOND = timedelta(seconds=1)
MOMENT = timedelta(microseconds=1)
ALWAYS = datetime(2000, 1, 1, tzinfo=UTC)
ZONES = (
    "UTC",
    "Europe/Berlin",
    "America/New_York",
    "Asia/Kolkata",
    "Australia/Lord_Howe",  # half an hour of daylight saving
    "Pacific/Chatham",
    "America/Havana",  # clocks go back from one to midnight: that day begins twice
    "Africa/Cairo",  # clocks go forward at midnight: that day begins at one
    "Atlantic/Azores",
    "Pacific/Kiritimati",
)
NAMES = "SELECT headrace.budget_windows($1)"
ENDS = "SELECT $2::timestamptz + make_interval(secs => headrace.window_ends_in($1, $2))"


def names_of(moment: datetime, zone: str) -> set[str]:
    """The same by Python's own data of the zones."""
    local = moment.astimezone(ZoneInfo(zone))
    year, week, _ = local.isocalendar()
    return {"total", f"day:{local:%Y-%m-%d}", f"month:{local:%Y-%m}", f"week:{year:04}-W{week:02}"}


@settings(
    max_examples=150,
    derandomize=True,
)
@given(
    zone=st.sampled_from(ZONES),
    hours=st.integers(0, 3 * 366 * 24),
    seconds=st.integers(0, 3599),
)
async def test_windows_are_those_of_the_zone_and_end_when_the_next_begin(
    pool: Pool, zone: str, hours: int, seconds: int
) -> None:
    await pool.execute("TRUNCATE headrace.time_zones")
    await pool.execute("INSERT INTO headrace.time_zones VALUES ($1, $2)", ALWAYS, zone)
    await check(pool, datetime(2025, 1, 1, tzinfo=UTC) + timedelta(hours=hours, seconds=seconds), zone)


@pytest.mark.parametrize(
    ("zone", "day", "hours"),
    [
        ("Europe/Berlin", "2026-03-29", 23),
        ("Europe/Berlin", "2026-10-25", 25),
        ("Australia/Lord_Howe", "2026-04-05", 24.5),
        ("America/Havana", "2026-11-01", 25),
        ("America/Havana", "2026-03-08", 23),
        ("Africa/Cairo", "2026-04-24", 23),
    ],
)
async def test_a_day_of_a_change_of_the_clocks_is_as_long_as_it_is(
    pool: Pool, zone: str, day: str, hours: float
) -> None:
    await pool.execute("INSERT INTO headrace.time_zones VALUES ($1, $2)", ALWAYS, zone)
    noon = datetime.fromisoformat(f"{day}T12:00").replace(tzinfo=ZoneInfo(zone)).astimezone(UTC)
    last = await pool.fetchval(ENDS, "day", noon - timedelta(days=1))
    assert await pool.fetchval(ENDS, "day", noon) - last == timedelta(hours=hours)
    for moment in (last - SECOND, last, last + timedelta(minutes=59), last + timedelta(hours=1)):
        await check(pool, moment, zone)


async def check(pool: Pool, moment: datetime, zone: str) -> None:
    assert set(await pool.fetchval(NAMES, moment)) == names_of(moment, zone)
    for kind in ("day", "week", "month"):
        ends = await pool.fetchval(ENDS, kind, moment)
        assert ends > moment
        name = {one.split(":")[0]: one for one in names_of(moment, zone)}[kind]
        assert name in names_of(ends - MOMENT, zone)
        assert name not in names_of(ends, zone)
    assert await pool.fetchval(ENDS, "total", moment) is None


async def test_all_moments_of_a_minute_are_in_the_same_windows(pool: Pool) -> None:
    """Spend is booked by the minute in which it was held."""
    for zone in ZONES:
        await pool.execute("TRUNCATE headrace.time_zones")
        await pool.execute("INSERT INTO headrace.time_zones VALUES ($1, $2)", ALWAYS, zone)
        turned_inside = await pool.fetchval(
            "SELECT count(*) FROM generate_series('2026-01-01'::timestamptz, '2027-01-01', '1 day') AS day,"
            " LATERAL (SELECT day + make_interval(secs => headrace.window_ends_in('day', day)) AS turn) AS t"
            " WHERE date_trunc('minute', turn, 'UTC') <> turn"
        )
        assert turned_inside == 0


async def test_a_week_is_the_sum_of_its_days(
    pool: Pool, budgets: Budgets, redis: Redis, clock: Clock
) -> None:
    now = datetime.now(UTC)
    monday = (now + timedelta(days=21 - now.weekday())).replace(hour=12)
    await clock.advance(monday - now)
    spender = await Spender.start(pool)
    await budgets.set("tag:x", WindowKind.WEEK, NanoUSD(100), BudgetPolicy.WAIT)
    for _ in range(3):
        call = await spender.open(budgets, 30, "tag:x")
        await budgets.settle([await spender.conclude(call, cost=25)])
        await clock.advance(timedelta(days=2))
    refused = await spender.refused(budgets, 26, "tag:x")
    assert (refused.kind, refused.missing) == (WindowKind.WEEK, 1)
    await budgets.rebuild()
    (view,) = await budgets.view()
    assert (view.state.settled, view.state.window.split(":")[0]) == (75, "week")
    assert (await counted(redis, "tag:x", view.state.window))[0] == 75
    assert (await spender.refused(budgets, 26, "tag:x")).missing == 1
    await clock.advance(timedelta(days=1))
    await spender.open(budgets, 100, "tag:x")


async def test_another_time_zone_holds_from_a_full_minute_on_and_corrections_stay_where_they_were(
    pool: Pool, budgets: Budgets, clock: Clock
) -> None:
    """At noon UTC it is tomorrow already on the Line Islands."""
    now = datetime.now(UTC)
    await clock.advance(now.replace(hour=12, minute=0, second=30) + timedelta(days=3) - now)
    spender = await Spender.start(pool)
    await budgets.set("global", WindowKind.DAY, NanoUSD(100), BudgetPolicy.WAIT)
    before = await spender.hold(budgets, 10, "global")
    call = await spender.open(budgets, 60, "global")
    await budgets.settle([await spender.conclude(call, suspense=60)])
    today = (await budgets.view())[0].state.window
    since = await budgets.set_time_zone("Pacific/Kiritimati")
    assert not await spender.intend(before)
    refused = await spender.refused(budgets, 41, "global")
    assert refused.ends_in is not None
    assert refused.ends_in <= timedelta(minutes=2)
    assert since.second == 0
    await clock.advance(timedelta(minutes=2))
    tomorrow = await spender.open(budgets, 100, "global")
    late = await spender.conclude(call, cost=7)
    await budgets.settle([await spender.conclude(tomorrow, cost=90), late])
    rows = await pool.fetch(
        "SELECT window_name AS name, sum(settled_nano)::int AS settled FROM headrace.spend GROUP BY 1"
    )
    booked = {row["name"]: row["settled"] for row in rows}
    (view,) = await budgets.view()
    assert (booked[today], booked[view.state.window], booked["total"]) == (7, 90, 97)
    assert view.state.suspense == 0
    assert (await money.time_zone(pool)).name == "Pacific/Kiritimati"
    with pytest.raises(InvalidInput, match="'Europe/Atlantis' is not a time zone"):
        await budgets.set_time_zone("Europe/Atlantis")
