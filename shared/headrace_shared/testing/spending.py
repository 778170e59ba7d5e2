"""Spending in tests: one running job that makes as many calls as a test likes."""

from collections import Counter
from dataclasses import dataclass
from datetime import timedelta

from headrace_shared.budgets import Budgets, Held, HoldRequest, Settlement
from headrace_shared.dispatch import keys
from headrace_shared.dispatch.connection import Redis
from headrace_shared.ids import CallNumber, HoldId, JobId, Lane, RouteName, Run, Tenant, WorkerId, new_job_id
from headrace_shared.job import NewJob
from headrace_shared.money import NanoUSD
from headrace_shared.request import Endpoint
from headrace_shared.store import claims, jobs, runs
from headrace_shared.store.money import Refused
from headrace_shared.store.pool import Pool
from headrace_shared.testing.clock import script

_WORKER = WorkerId("spender")
_LONG = timedelta(days=100)
_FLUSH = """
local shift = redis.call('GET', 'headrace:clock')
redis.call('FLUSHDB')
if shift then redis.call('SET', 'headrace:clock', shift) end
return 1
"""


@dataclass(frozen=True, slots=True)
class Call:
    """A call that is held for."""

    number: CallNumber
    scopes: tuple[str, ...]
    held: Held


class Spender:
    """Makes the calls of one job that is running for the whole test."""

    def __init__(self, pool: Pool, job_id: JobId) -> None:
        self._pool = pool
        self._job_id = job_id
        self._calls = 0

    @classmethod
    async def start(cls, pool: Pool) -> "Spender":
        job = NewJob(
            id=new_job_id(),
            tenant=Tenant("acme"),
            lane=Lane("default"),
            route=RouteName("gpt-4o-mini"),
            endpoint=Endpoint.CHAT_COMPLETIONS,
            body=b"{}",
            max_attempts=6,
        )
        await jobs.insert_jobs(pool, [job], configuration=0, keep_keys=_LONG)
        await claims.claim_jobs(pool, [job.id], _WORKER, _LONG)
        return cls(pool, job.id)

    async def try_hold(self, budgets: Budgets, amount: int, *scopes: str) -> Call | Refused:
        self._calls += 1
        number = CallNumber(self._calls)
        request = HoldRequest(HoldId(f"{self._job_id}:1:{number}"), NanoUSD(amount), scopes)
        (answer,) = await budgets.hold([request])
        return Call(number, scopes, answer) if isinstance(answer, Held) else answer

    async def hold(self, budgets: Budgets, amount: int, *scopes: str) -> Call:
        call = await self.try_hold(budgets, amount, *scopes)
        if not isinstance(call, Call):
            raise AssertionError(call)  # noqa: TRY004 - a test's expectation failed
        return call

    async def refused(self, budgets: Budgets, amount: int, *scopes: str) -> Refused:
        answer = await self.try_hold(budgets, amount, *scopes)
        if not isinstance(answer, Refused):
            raise AssertionError(answer)  # noqa: TRY004 - a test's expectation failed
        return answer

    async def intend(self, call: Call) -> bool:
        """Write the call's intent; false when it must not be sent."""
        intent = runs.Intent(
            job_id=self._job_id,
            run=Run(1),
            call=call.number,
            provider="openai",
            model="m",
            hold_id=call.held.id,
            held=call.held.amount,
            held_at=call.held.at,
            scopes=call.scopes,
            price_version="1",
        )
        return bool(await runs.open_calls(self._pool, call.held.epoch, [intent]))

    async def open(self, budgets: Budgets, amount: int, *scopes: str) -> Call:
        call = await self.hold(budgets, amount, *scopes)
        if not await self.intend(call):
            raise AssertionError(call)
        return call

    async def conclude(self, call: Call, *, cost: int = 0, suspense: int = 0) -> Settlement:
        """Book in the ledger what the call came to; its settlement is what is left to do."""
        conclusion = runs.Conclusion(
            self._job_id,
            Run(1),
            call.number,
            "suspense" if suspense else "answered",
            timedelta(0),
            cost=NanoUSD(cost),
            suspense=NanoUSD(suspense),
            answer=b"",
        )
        await runs.finish(self._pool, _WORKER, 1, conclusions=[conclusion], attempts=[], ends=[])
        return Settlement(call.held.id, NanoUSD(cost), NanoUSD(suspense))


async def counted(redis: Redis, scope: str, window: str = "total") -> tuple[int, int, int]:
    """Return what Redis says is settled, in suspense, and held."""
    found = Counter({name: int(value) for name, value in (await redis.hash(keys.SPENT)).items()})
    return (
        found[f"{scope}|{window}|settled"],
        found[f"{scope}|{window}|suspense"],
        found[f"{scope}|{window}|held"],
    )


async def flush(redis: Redis) -> None:
    """Lose everything but the test's own clock."""
    await redis.evaluate(script(_FLUSH))
