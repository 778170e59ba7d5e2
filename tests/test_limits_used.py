"""How much of a limit is used, and how many calls are refused, as providers keep limits in different ways.

Time is virtual: the server's clock is put where the simulation stands.
"""

import heapq
from dataclasses import dataclass, field
from datetime import timedelta
from random import Random

import pytest

from headrace_shared.configuration import Configuration
from headrace_shared.dispatch import limits
from headrace_shared.dispatch.connection import Redis
from headrace_shared.dispatch.limits import AdmitRequest, Admitted, Report, limiter_of
from headrace_shared.limits import LimitKind, read_told
from headrace_shared.routes import Target
from headrace_shared.testing.clock import script
from headrace_shared.testing.limits import Enforcement, RateLimits

TARGET = Target("openai", "gpt-4o-mini")
NAME = limiter_of(TARGET)
RPM, TPM = 3000, 1_000_000
STEP = 0.1
AT = script(
    "local time = redis.call('TIME')"
    " redis.call('SET', 'headrace:clock', string.format('%.0f',"
    " tonumber(ARGV[1]) - time[1] * 1000 - math.floor(time[2] / 1000)))"
)
BEGIN = 1_800_000_000.0


@dataclass
class Simulation:
    """One process that always has work, and a provider with limits; others may use them as well."""

    redis: Redis
    enforcement: Enforcement
    headers: bool = True
    others: float = 0.0
    """The share of the requests that somebody else makes."""
    random: Random = field(default_factory=lambda: Random(7))  # noqa: S311 - repeatable on purpose
    now: float = BEGIN
    answered: int = 0
    refused: int = 0

    def __post_init__(self) -> None:
        self.calls: list[tuple[float, int, int]] = []
        self.owed = 0.0
        self.keep(RPM, TPM)

    def keep(self, requests: int, tokens: int) -> None:
        self.provider = RateLimits(requests, tokens, self.enforcement, clock=lambda: self.now)

    async def publish(self, *, known: bool = True) -> None:
        both = {"requests_per_minute": RPM, "tokens_per_minute": TPM}
        document = {"limits": {"openai/gpt-4o-mini": both}} if known else {}
        await limits.publish(self.redis, 1, Configuration.from_document(document))

    async def run(self, seconds: float) -> tuple[float, float]:
        """Return the share of the limit that was used, and the share of calls that were refused."""
        self.answered = self.refused = 0
        ending = self.now + seconds
        while self.now < ending:
            await self._step()
        return self.answered / (RPM * seconds / 60), self.refused / (self.answered + self.refused)

    async def _step(self) -> None:
        begun = self.now
        await self.redis.evaluate(AT, (), [round(begun * 1000)])
        requests = [AdmitRequest(str(number), TARGET, 400, 300) for number in range(50)]
        decided = await limits.admit(self.redis, 1, requests, lead=timedelta(milliseconds=200))
        assert decided is not None
        for one in decided[0]:
            if isinstance(one, Admitted):
                moment = begun + one.delay.total_seconds() + self.random.uniform(0, 0.005)
                heapq.heappush(self.calls, (moment, self.random.randint(100, 250), one.tokens))
        await self._send_until(begun + STEP)

    async def _send_until(self, till: float) -> None:
        report = Report(NAME)
        self.owed += self.others * RPM / 60 * STEP
        while self.owed >= 1:
            self.owed -= 1
            self.provider.take(TARGET.model, 200)
        while self.calls and self.calls[0][0] < till and not report.refused:
            self.now, tokens, reserved = heapq.heappop(self.calls)
            standing = self.provider.take(TARGET.model, tokens)
            if standing.exceeded is not None:
                self.refused += 1
                report.refused = {LimitKind(standing.exceeded): 1}
                report.wait = timedelta(seconds=standing.wait)
                # What was let go before is asked for anew once it is time.
                self.calls.clear()
            else:
                self.answered += 1
                report.answered += 1
                report.tokens += tokens
                report.reserved += reserved
                report.input_tokens += tokens // 2
                report.input_bounds += 400
                report.output_tokens += tokens - tokens // 2
            report.told = read_told(standing.headers) if self.headers else None
        self.now = till
        await self.redis.evaluate(AT, (), [round(till * 1000)])
        await limits.report(self.redis, [report])


@pytest.mark.parametrize("enforcement", Enforcement)
async def test_a_known_limit_is_used_to_97_percent_and_few_calls_are_refused(
    redis: Redis, enforcement: Enforcement
) -> None:
    simulation = Simulation(redis, enforcement)
    await simulation.publish()
    used, refused = await simulation.run(20)
    assert used >= 0.97
    assert refused < 0.005


async def test_a_limit_that_nobody_says_is_found(redis: Redis) -> None:
    simulation = Simulation(redis, Enforcement.SECOND, headers=False)
    await simulation.publish(known=False)
    await simulation.run(30)
    used, refused = await simulation.run(20)
    assert used >= 0.95
    assert refused < 0.01


async def test_a_limit_that_is_halved_is_followed(redis: Redis) -> None:
    simulation = Simulation(redis, Enforcement.SECOND)
    await simulation.publish()
    await simulation.run(5)
    simulation.keep(RPM // 2, TPM // 2)
    used, refused = await simulation.run(20)
    assert 0.92 / 2 <= used <= 1 / 2
    assert refused < 0.01


async def test_what_somebody_else_uses_is_left_to_him(redis: Redis) -> None:
    simulation = Simulation(redis, Enforcement.MINUTE, others=0.3)
    await simulation.publish()
    used, refused = await simulation.run(60)
    assert used >= 0.92 - 0.3
    assert refused < 0.01


async def test_work_that_comes_after_a_rest_is_no_burst(redis: Redis) -> None:
    simulation = Simulation(redis, Enforcement.SECOND)
    await simulation.publish()
    await simulation.run(3)
    simulation.now += 600
    used, refused = await simulation.run(10)
    assert used >= 0.95
    assert refused < 0.005
