"""The limits of providers, as one process takes part in keeping them.

The buckets are the fleet's, in Redis (`dispatch/limits.py`). Calls that are ready are admitted many at
a time in one script, and wait here for the fraction of a second until their moment; what they came to is
reported in the same way, so that what was reserved is settled and what the provider said is known to all.
Without Redis each process keeps its share of what it knew last (`limiting_alone.py`).
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from headrace_shared.batching import Batcher
from headrace_shared.dispatch import limits
from headrace_shared.dispatch.connection import Redis
from headrace_shared.dispatch.limits import (
    AdmitRequest,
    Admitted,
    Report,
    Standing,
    Wait,
    limiter_of,
    limiters_of,
)
from headrace_shared.errors import DispatchUnavailable
from headrace_shared.limits import exceeded_kind, read_told
from headrace_shared.logs import Occasional
from headrace_shared.outcome import ErrorClass
from headrace_shared.routes import Target
from headrace_shared.store.pool import Database
from headrace_workers.configured import Configured
from headrace_workers.limiting_alone import Alone
from headrace_workers.replies import Answered, Refused, Reply

_occasionally = Occasional(logging.getLogger(__name__))

REPORT_INTERVAL = 0.02
"""Seconds that what calls came to is gathered before it is reported."""

_TICK = 1.0
_PAUSE_WITHOUT_WORD = timedelta(seconds=1)
"""For how long nobody sends after a refusal that did not say how long; the script has the same."""


@dataclass(frozen=True, slots=True)
class Admission:
    """Leave to make one call; it is given back, with what the call came to, by `Limiter.settle`."""

    id: str
    target: Target
    input_bound: int
    tokens: int
    """What was reserved."""


class Limiter:
    """All limits of a process; also what the choice of a target asks (`choosing.Waits`)."""

    def __init__(self, redis: Redis, configured: Configured, database: Database) -> None:
        self._redis = redis
        self._configured = configured
        self._alone = Alone(configured, database, self._calls_under_way)
        self._admissions = Batcher[AdmitRequest, Admitted | Wait](
            self._admit, max_size=500, unclaimed=self._give_back
        )
        self._under_way: dict[str, Admission] = {}
        self._reports: dict[str, Report] = {}
        self._news = asyncio.Event()
        self._standings: dict[str, tuple[Standing, float]] = {}
        self._cooling: dict[str, tuple[float, float]] = {}
        self._published: tuple[int, str] | None = None
        self._renewed = time.monotonic()

    def wait_of(self, target: Target) -> timedelta:
        """Return how long a call would wait for its limits, as far as is known here."""
        now, longest = time.monotonic(), 0.0
        for name in limiters_of(target):
            if (known := self._standings.get(name)) is not None:
                standing, at = known
                longest = max(longest, standing.wait.total_seconds() - (now - at))
        return timedelta(seconds=longest)

    async def admit(self, call: str, target: Target, input_bound: int, output_bound: int) -> Admission | Wait:
        """Let a call go at its moment, which is waited for here when near; else say when to ask again."""
        request = AdmitRequest(call, target, input_bound, output_bound)
        while True:
            asked = time.monotonic()
            verdict = await self._admissions.submit(request)
            if isinstance(verdict, Wait):
                return verdict
            admission = self._under_way[call]
            try:
                if verdict.delay:
                    await asyncio.sleep(verdict.delay.total_seconds())
            except asyncio.CancelledError:
                self.settle(admission, None)
                raise
            if not self._cooled_since(target, asked):
                return admission
            # The provider refused another call meanwhile: nobody sends until it is time, and then in turn.
            self.settle(admission, None)

    def _let_go(self, request: AdmitRequest, verdict: Admitted | Wait) -> None:
        if isinstance(verdict, Admitted):
            admission = Admission(request.id, request.target, request.input_bound, verdict.tokens)
            self._under_way[request.id] = admission

    def _calls_under_way(self, name: str) -> int:
        return sum(name in limiters_of(one.target) for one in self._under_way.values())

    def _give_back(self, request: AdmitRequest, verdict: Admitted | Wait) -> None:
        """The call's run was interrupted before it learnt that it may go."""
        if isinstance(verdict, Admitted):
            self.settle(self._under_way[request.id], None)

    def settle(self, admission: Admission, reply: Reply | None) -> None:
        """Take note of what a call came to; None where it was not made."""
        self._under_way.pop(admission.id, None)
        said = reply.limit_headers if isinstance(reply, Answered | Refused) else None
        own, *_ = names = limiters_of(admission.target)
        refused = isinstance(reply, Refused) and reply.failure.error_class is ErrorClass.RATE_LIMITED
        if not said and not refused and not any(self._is_limited(name) for name in names):
            return
        for name in names:
            report = self._report_of(name)
            if self._has_permits(name):
                report.given_back.append(admission.id)
            if isinstance(reply, Answered):
                _add(report, admission, reply)
            elif reply is None or (isinstance(reply, Refused) and not refused):
                # It took nothing. What was refused for its limit counts there all the same.
                report.reserved += admission.tokens
        if reply is not None and said:
            _hear(self._reports[own], said, reply.latency)
        if refused and isinstance(reply, Refused):
            self._refuse(self._reports[own], reply)
        self._news.set()

    def pass_by(self, target: Target) -> None:
        """Take note of a claimed job that did not come to its call."""
        for name in limiters_of(target):
            self._report_of(name).passed_by += 1
        self._news.set()

    def _refuse(self, report: Report, reply: Refused) -> None:
        kind = exceeded_kind(read_told(reply.limit_headers), reply.failure.message)
        report.refused[kind] = report.refused.get(kind, 0) + 1
        cap = self._configured.now.retries.retry_after_cap
        asked = reply.failure.retry_after
        if asked is not None:
            report.wait = max(report.wait or timedelta(0), min(asked, cap))
        report.refused_age = max(report.refused_age, reply.latency) if report.refused_age else reply.latency
        self._cool(report.limiter, _PAUSE_WITHOUT_WORD if asked is None else min(asked, cap))

    def _cool(self, name: str, duration: timedelta) -> None:
        until, now = time.monotonic() + duration.total_seconds(), time.monotonic()
        if until > self._cooling.get(name, (0.0, 0.0))[0] + 0.01:
            self._cooling[name] = until, now

    def _cooled_since(self, target: Target, moment: float) -> bool:
        until, learned = self._cooling.get(limiter_of(target), (0.0, 0.0))
        return learned >= moment and until > time.monotonic()

    def _report_of(self, name: str) -> Report:
        report = self._reports.get(name)
        if report is None:
            report = self._reports[name] = Report(name)
        return report

    def _has_permits(self, name: str) -> bool:
        known = self._standings.get(name)
        return known is not None and known[0].concurrent is not None

    def _is_limited(self, name: str) -> bool:
        known = self._standings.get(name)
        if known is None:
            return False
        standing = known[0]
        limits_of = (standing.requests_per_minute, standing.tokens_per_minute, standing.concurrent)
        return any(limit is not None for limit in limits_of)

    async def _admit(self, requests: Sequence[AdmitRequest]) -> Sequence[Admitted | Wait]:
        try:
            for _ in range(2):
                version = self._configured.now.version
                decided = await limits.admit(self._redis, version, requests)
                if decided is not None:
                    verdicts, standings = decided
                    self._learn(standings)
                    for request, verdict in zip(requests, verdicts, strict=True):
                        self._let_go(request, verdict)
                    return verdicts
                await self._publish()
        except DispatchUnavailable:
            pass
        return [await self._admit_alone(request) for request in requests]

    async def _admit_alone(self, request: AdmitRequest) -> Admitted | Wait:
        verdict = await self._alone.admit(request)
        self._let_go(request, verdict)
        return verdict

    def _learn(self, standings: Sequence[Standing]) -> None:
        now = time.monotonic()
        for standing in standings:
            self._standings[standing.limiter] = standing, now
            if standing.cooling:
                self._cool(standing.limiter, standing.cooling)
        self._alone.learn(standings)

    async def _publish(self) -> None:
        now = self._configured.now
        await limits.publish(self._redis, now.version, now.configuration)
        self._published = now.version, self._redis.run_id

    async def run(self) -> None:
        """Report what calls came to, keep permits, and follow the configuration, until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), _TICK)
            try:
                if self._published != (self._configured.now.version, self._redis.run_id):
                    await self._publish()
                await self.report()
            except DispatchUnavailable as error:
                _occasionally.warning("limits are not shared: %s", error)
                self._reports.clear()
                await asyncio.sleep(_TICK)
            await asyncio.sleep(REPORT_INTERVAL)

    async def report(self) -> None:
        """Report what has not been reported yet.

        Raises:
            DispatchUnavailable: nothing of it was; permits end by themselves.

        """
        self._news.clear()
        self._keep_permits()
        reports, self._reports = self._reports, {}
        if reports:
            self._learn(await limits.report(self._redis, list(reports.values())))

    async def drain(self) -> None:
        """Report for the last time."""
        with contextlib.suppress(DispatchUnavailable):
            await self.report()

    def _keep_permits(self) -> None:
        if time.monotonic() - self._renewed < limits.PERMIT_LEASE.total_seconds() / 3:
            return
        self._renewed = time.monotonic()
        for admission in self._under_way.values():
            for name in limiters_of(admission.target):
                if self._has_permits(name):
                    self._report_of(name).kept.append(admission.id)


def _add(report: Report, admission: Admission, reply: Answered) -> None:
    usage = reply.usage
    report.answered += 1
    report.tokens += usage.prompt_tokens + usage.completion_tokens
    report.reserved += admission.tokens
    report.input_tokens += usage.prompt_tokens
    report.input_bounds += admission.input_bound
    report.output_tokens += usage.completion_tokens


def _hear(report: Report, said: Mapping[str, str], age: timedelta) -> None:
    if report.told is not None and age >= report.told_age:
        return
    if (told := read_told(said)) is not None:
        report.told, report.told_age = told, age
