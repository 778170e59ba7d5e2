"""What the simulated provider answered and what it would bill: the auditor of the ledger."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from pydantic import JsonValue

from headrace_shared.hosted_tools import NO_TOOLS, Hosted, ToolCalls
from headrace_shared.testing.calls import Endpoint

UNKNOWN_MODEL = "unknown"
"""The model of a request that was refused before its model could be read."""


@dataclass(frozen=True, slots=True)
class Usage:
    """The tokens of one call."""

    prompt: int
    completion: int = 0
    cached: int = 0
    tools: ToolCalls = NO_TOOLS


@dataclass(frozen=True, slots=True)
class Request:
    """What became of one request."""

    id: str
    model: str
    endpoint: Endpoint
    prompt_hash: str
    status: int | None
    """None when nothing was answered: hung, or left by its caller."""
    answered: bool = False
    """Answered 2xx with a body that can be read."""
    usage: Usage | None = None
    """What would be billed; None when nothing was generated."""
    hosted: Hosted | None = None
    """The tools that it might run."""


@dataclass(slots=True)
class Account:
    """The counts of one model at one endpoint, or a sum of several."""

    requests: int = 0
    answered: int = 0
    """Answered 2xx with a body that can be read."""
    by_status: Counter[int] = field(default_factory=Counter[int])
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    unanswered: int = 0
    """Billed, but hung, cut, garbled, or left by the caller while it was generated."""
    unanswered_prompt_tokens: int = 0
    unanswered_completion_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def book(self, request: Request) -> None:
        self.requests += 1
        if request.status is not None:
            self.by_status[request.status] += 1
        usage = request.usage
        if usage is not None and request.answered:
            self.answered += 1
            self.prompt_tokens += usage.prompt
            self.completion_tokens += usage.completion
            self.cached_tokens += usage.cached
        elif usage is not None:
            self.unanswered += 1
            self.unanswered_prompt_tokens += usage.prompt
            self.unanswered_completion_tokens += usage.completion

    def add(self, other: "Account") -> None:
        self.requests += other.requests
        self.answered += other.answered
        self.by_status.update(other.by_status)
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens
        self.cached_tokens += other.cached_tokens
        self.unanswered += other.unanswered
        self.unanswered_prompt_tokens += other.unanswered_prompt_tokens
        self.unanswered_completion_tokens += other.unanswered_completion_tokens

    def as_json(self) -> dict[str, JsonValue]:
        return {
            "requests": self.requests,
            "answered": self.answered,
            "by_status": {str(status): count for status, count in sorted(self.by_status.items())},
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.total_tokens,
            "cached_tokens": self.cached_tokens,
            "unanswered": self.unanswered,
            "unanswered_prompt_tokens": self.unanswered_prompt_tokens,
            "unanswered_completion_tokens": self.unanswered_completion_tokens,
        }


class Books:
    """The live account of everything a simulated provider was asked.

    Only POSTs to the four model endpoints are booked. With `record`, `requests` logs each of them,
    oldest first, up to `limit`; without it, it stays empty.
    """

    def __init__(self, *, record: bool = False, limit: int = 1_000_000) -> None:
        self._record = record
        self._limit = limit
        self._waiters: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []
        self.in_flight = 0
        self.clear()

    def clear(self) -> None:
        self._accounts: dict[tuple[str, Endpoint], Account] = {}
        self.requests: list[Request] = []
        self.requests_by_key: Counter[str] = Counter()
        """Long keys are shortened to their two ends."""
        self.max_concurrent = self.in_flight
        self.first_at: float | None = None
        """Seconds since the epoch."""
        self.last_at: float | None = None

    @property
    def total(self) -> Account:
        return _sum(self._accounts.values())

    def of(self, *, model: str | None = None, endpoint: Endpoint | None = None) -> Account:
        """Return the sum over one model, one endpoint, or one model at one endpoint."""
        return _sum(
            account
            for key, account in self._accounts.items()
            if model in {None, key[0]} and endpoint in {None, key[1]}
        )

    def arrive(self, key: str) -> None:
        now = time.time()
        self.first_at = now if self.first_at is None else self.first_at
        self.last_at = now
        self.in_flight += 1
        self.max_concurrent = max(self.max_concurrent, self.in_flight)
        self.requests_by_key[key if len(key) <= _SHOWN_KEY else f"{key[:3]}...{key[-4:]}"] += 1
        self._wake()

    def leave(self) -> None:
        self.in_flight -= 1
        self.last_at = time.time()
        self._wake()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition on the books holds, asked when a request arrives and when it leaves."""
        if condition():
            return
        waiter = condition, asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter[1]
        finally:
            self._waiters.remove(waiter)

    def book(self, request: Request) -> None:
        account = self._accounts.get((request.model, request.endpoint))
        if account is None:
            account = self._accounts[request.model, request.endpoint] = Account()
        account.book(request)
        if self._record and len(self.requests) < self._limit:
            self.requests.append(request)

    def as_json(self) -> dict[str, JsonValue]:
        models: dict[str, JsonValue] = {}
        for model in sorted({model for model, _ in self._accounts}):
            models[model] = {
                endpoint.value: account.as_json()
                for (of_model, endpoint), account in self._accounts.items()
                if of_model == model
            }
        return {
            "total": self.total.as_json(),
            "models": models,
            "requests_by_key": dict(self.requests_by_key),
            "in_flight": self.in_flight,
            "max_concurrent": self.max_concurrent,
            "first_at": self.first_at,
            "last_at": self.last_at,
        }

    def _wake(self) -> None:
        for condition, woken in self._waiters:
            if not woken.done() and condition():
                woken.set_result(None)


_SHOWN_KEY = 16


def _sum(accounts: Iterable[Account]) -> Account:
    total = Account()
    for account in accounts:
        total.add(account)
    return total
