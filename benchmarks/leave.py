"""What the leave for a call costs a worker: its money held over the budgets, its room under the limits."""

from child import child
from figures import Figure
from stage import open_stage

from headrace_shared.budgets import Budgets
from headrace_shared.configuration import Configuration
from headrace_shared.dispatch.connection import Redis
from headrace_shared.money import NanoUSD
from headrace_shared.store import configurations
from headrace_shared.store.money import BudgetPolicy, WindowKind
from headrace_shared.store.pool import open_pool

_NAME = "hold and admit"
_AT_ONCE = 64
_LIMITS = {"requests_per_minute": 60_000_000, "tokens_per_minute": 2_000_000_000}
_PLENTY = NanoUSD(10**15)


async def measure(jobs: int) -> list[Figure]:
    async with open_stage() as stage:
        document = {"limits": {"openai/gpt-4o-mini": _LIMITS}}
        pool, redis = await open_pool(stage.postgres_url, size=1), Redis(stage.redis_url)
        await configurations.apply(pool, Configuration.from_document(document), "bench")
        budgets = Budgets(pool, redis)
        for scope in ("global", "tenant:acme"):
            await budgets.set(scope, WindowKind.DAY, _PLENTY, BudgetPolicy.WAIT)
        await redis.close()
        await pool.close()
        waves = max(20, 4 * jobs // _AT_ONCE)
        async with child("leave_process.py", waves, _AT_ONCE, environment=stage.environment()) as process:
            took = await process.hear()
    name = f"{_NAME}, {_AT_ONCE} at a time, two budgets, two limits"
    return [
        Figure(name, "hold and admit", float(took["leave"]), "ms CPU/job", at_most=0.15),
        Figure(name, "settling both", float(took["settle"]), "ms CPU/job"),
    ]
