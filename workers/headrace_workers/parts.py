"""What the steps and the side services of a process share, and the road that is made of it."""

import contextlib
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from headrace_shared.budgets import Budgets
from headrace_shared.dispatch.connection import Redis
from headrace_shared.dispatch.dispatch import Dispatch
from headrace_shared.ids import JobId, WorkerId
from headrace_shared.job import ClaimedJob
from headrace_shared.settings import Settings
from headrace_shared.store.pool import WORKER_POOL_SIZE, Pool, open_pool
from headrace_workers.alerts import Refusals
from headrace_workers.breaker import Breakers
from headrace_workers.choosing import Choosing
from headrace_workers.clients import Clients
from headrace_workers.configured import Configured
from headrace_workers.execution import Execution, Road, Step
from headrace_workers.finisher import Finisher
from headrace_workers.handlers.loading import Handlers, open_handlers
from headrace_workers.leases import Leases
from headrace_workers.lengths import Lengths
from headrace_workers.limiting import Limiter
from headrace_workers.reach import check_at_start
from headrace_workers.retry_budget import RetryBudget as Budget
from headrace_workers.steps.admit import Admit
from headrace_workers.steps.breaker import Breaker
from headrace_workers.steps.call import Call
from headrace_workers.steps.downgrade import Downgrade
from headrace_workers.steps.guard import Guard
from headrace_workers.steps.handle import Handle
from headrace_workers.steps.hold import Hold
from headrace_workers.steps.journal import Journal
from headrace_workers.steps.lease import Lease
from headrace_workers.steps.retry_budget import RetryBudget
from headrace_workers.steps.route import Route
from headrace_workers.steps.settle import Settle
from headrace_workers.steps.share import Share
from headrace_workers.telemetry import Telemetry, setup


@dataclass(frozen=True, slots=True)
class Parts:
    """What the steps and the side services of one process share."""

    pool: Pool
    redis: Redis
    dispatch: Dispatch
    budgets: Budgets
    configured: Configured
    breakers: Breakers
    limiter: Limiter
    clients: Clients
    finisher: Finisher
    telemetry: Telemetry
    running: dict[JobId, ClaimedJob]
    """The jobs that this worker has claimed and whose ends are not yet committed: what a heartbeat renews."""
    leases: Leases
    handlers: Handlers
    lengths: Lengths
    choosing: Choosing
    retry_budget: Budget


def steps_of(parts: Parts) -> tuple[Step, ...]:
    """The road of a call. `Settle` follows the last of them, whatever they came to."""
    return (
        Share(parts.pool),
        Route(parts.configured, parts.choosing),
        Hold(
            parts.budgets, parts.dispatch, Downgrade(parts.configured, parts.choosing), Refusals(parts.pool)
        ),
        RetryBudget(parts.retry_budget, parts.breakers),
        Admit(parts.limiter),
        Breaker(parts.breakers),
        Journal(parts.pool, parts.budgets),
        Lease(parts.leases),
        Call(parts.clients, parts.breakers),
    )


def execution_of(parts: Parts) -> Execution:
    calls = steps_of(parts)
    settle = Settle(
        parts.finisher,
        parts.configured,
        parts.choosing,
        parts.retry_budget,
        parts.telemetry.metrics,
        breakers=parts.breakers,
        limiter=parts.limiter,
        lengths=parts.lengths,
    )
    handle = Handle(parts.handlers, Road(calls, settle), parts.pool, parts.configured)
    return Execution((Guard(), handle, *calls), settle)


@asynccontextmanager
async def open_parts(
    settings: Settings, worker_id: WorkerId, *, pool_size: int = WORKER_POOL_SIZE
) -> AsyncGenerator[Parts]:
    """Open everything a worker needs, and close it in the opposite order."""
    async with contextlib.AsyncExitStack() as stack:
        pool = await open_pool(settings.require_postgres(), size=pool_size, pooler=settings.pooler)
        stack.push_async_callback(pool.close)
        redis = Redis(settings.require_redis())
        stack.push_async_callback(redis.close)
        await check_at_start(redis, pool, worker_id)
        dispatch = Dispatch(redis)
        budgets = Budgets(pool, redis)
        configured = await Configured.load(pool)
        clients = Clients(configured, connections=settings.concurrency)
        stack.push_async_callback(clients.close)
        clients.of(configured.now.configuration.defaults.provider)
        telemetry = setup(settings, worker_id)
        stack.push_async_callback(telemetry.shutdown)
        handlers = await stack.enter_async_context(open_handlers(settings.handlers))
        running: dict[JobId, ClaimedJob] = {}
        retry_budget = Budget(redis, configured)
        breakers = Breakers(dispatch, configured, retry_budget.unshared)
        limiter = Limiter(redis, configured, pool)
        yield Parts(
            pool,
            redis,
            dispatch,
            budgets,
            configured,
            breakers,
            limiter,
            clients,
            Finisher(pool, dispatch, budgets, worker_id, running),
            telemetry,
            running,
            Leases(),
            handlers,
            Lengths(pool),
            Choosing(configured, breakers, limiter),
            retry_budget,
        )
