"""Whatever happens in whatever order: settled + held + suspense <= limit, and in the end to the nano."""

import asyncio
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace_shared.budgets import Budgets, Settlement
from headrace_shared.dispatch.connection import Redis
from headrace_shared.money import NanoUSD
from headrace_shared.store.money import BudgetPolicy, WindowKind
from headrace_shared.store.pool import Pool
from headrace_shared.testing.spending import Call, Spender, counted, flush

pytestmark = pytest.mark.conformance

UNIT = 9_007_199_254_740_993 // 1000
LIMITS = {
    "global": 900 * UNIT,
    "tenant:a": 500 * UNIT + 1,
    "tenant:b": 600 * UNIT - 1,
    "key:k": 700 * UNIT,
    "model:m": 550 * UNIT + 7,
    "tag:x": 400 * UNIT,
}
KINDS = {"key:k": WindowKind.WEEK, "model:m": WindowKind.MONTH, "tag:x": WindowKind.DAY}
SOFT = "tag:counted"
SCOPES = (
    ("global", "tenant:a", "key:k", "model:m"),
    ("global", "tenant:b", "model:m", "tag:x", SOFT),
    ("tenant:a", "tenant:b", SOFT),
    ("tenant:b", "key:k", "model:free", "tag:x"),
)

processes = st.integers(0, 2)
amounts = st.integers(60, 300).map(lambda thousandths: thousandths * UNIT + thousandths % 5)
percents = st.sampled_from([0, 1, 50, 99, 100])
choices = st.integers(0, 10**6)
actions = st.one_of(
    st.tuples(st.just("call"), processes, choices, amounts),
    st.tuples(st.just("hold and crash"), processes, choices, amounts),
    st.tuples(st.sampled_from(["settle", "settle and crash"]), processes, choices, percents),
    st.tuples(st.sampled_from(["rebuild", "flush", "distrust"]), processes, choices, st.just(0)),
)
Action = tuple[str, int, int, int]


@dataclass
class World:
    """A few processes that spend, and what they know to have spent."""

    pool: Pool
    redis: Redis
    spender: Spender
    budgets: list[Budgets]
    windows: dict[str, str] = field(default_factory=dict[str, str])
    open: list[Call] = field(default_factory=list[Call])
    spent: Counter[str] = field(default_factory=Counter[str])
    doubtful: Counter[str] = field(default_factory=Counter[str])

    async def act(self, action: Action) -> None:
        kind, process, choice, amount = action
        budgets = self.budgets[process]
        match kind:
            case "call" | "hold and crash":
                call = await self.spender.try_hold(budgets, amount, *SCOPES[choice % len(SCOPES)])
                if kind == "call" and isinstance(call, Call) and await self.spender.intend(call):
                    self.open.append(call)
            case "settle" | "settle and crash" if self.open:
                settlement = await self.conclude(self.open.pop(choice % len(self.open)), amount)
                if kind == "settle":
                    await budgets.settle([settlement])
            case "rebuild":
                await budgets.rebuild()
            case "flush":
                await flush(self.redis)
            case "distrust":
                budgets.distrust()
            case _:
                pass

    async def conclude(self, call: Call, percent: int) -> Settlement:
        """An answer that cost a part of what was held, or one that nobody could read."""
        suspense = call.held.amount if percent == 0 else 0
        cost = 0 if suspense else call.held.amount * percent // 100
        self.spent.update(dict.fromkeys(call.scopes, cost))
        self.doubtful.update(dict.fromkeys(call.scopes, suspense))
        return await self.spender.conclude(call, cost=cost, suspense=suspense)

    async def check(self) -> None:
        for scope, limit in LIMITS.items():
            committed = sum(call.held.amount for call in self.open if scope in call.scopes)
            assert self.spent[scope] + self.doubtful[scope] + committed <= limit
            assert sum(await counted(self.redis, scope, self.windows[scope])) <= limit

    async def check_in_the_end(self) -> None:
        for call in self.open:
            await self.budgets[0].settle([await self.conclude(call, 99)])
        self.open.clear()
        await self.budgets[0].rebuild()
        for scope in [*LIMITS, SOFT]:
            window = self.windows[scope]
            assert await counted(self.redis, scope, window) == (self.spent[scope], self.doubtful[scope], 0)


@settings(
    max_examples=40,
    derandomize=True,
)
@given(steps=st.lists(st.lists(actions, min_size=1, max_size=4), min_size=10, max_size=20))
async def test_no_order_of_events_spends_more_than_the_limits(
    pool: Pool, redis: Redis, steps: list[list[Action]]
) -> None:
    """The actions of one step happen at once."""
    await pool.execute("TRUNCATE headrace.calls, headrace.spend, headrace.budgets")
    world = World(pool, redis, await Spender.start(pool), [Budgets(pool, redis) for _ in range(3)])
    for scope, limit in LIMITS.items():
        kind = KINDS.get(scope, WindowKind.TOTAL)
        await world.budgets[0].set(scope, kind, NanoUSD(limit), BudgetPolicy.WAIT)
    await world.budgets[0].set(SOFT, WindowKind.TOTAL, NanoUSD(1), BudgetPolicy.SOFT)
    world.windows = {view.state.scope: view.state.window for view in await world.budgets[0].view()}
    for step in steps:
        await asyncio.gather(*(world.act(action) for action in step))
        await world.check()
    await world.check_in_the_end()
