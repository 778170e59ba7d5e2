from collections.abc import Awaitable, Callable, Iterable
from datetime import timedelta
from enum import Enum
from typing import TypeVar

from aiobreaker.storage.base import CircuitBreakerStorage

_T = TypeVar("_T")

class CircuitBreakerState(Enum):
    OPEN = ...
    CLOSED = ...
    HALF_OPEN = ...

class CircuitBreakerError(Exception): ...

class CircuitBreakerListener:
    def state_change(self, breaker: CircuitBreaker, old: object, new: object) -> None: ...

class CircuitBreaker:
    def __init__(
        self,
        fail_max: int = ...,
        timeout_duration: timedelta | None = ...,
        exclude: Iterable[type[Exception]] | None = ...,
        listeners: Iterable[CircuitBreakerListener] | None = ...,
        state_storage: CircuitBreakerStorage | None = ...,
        name: str | None = ...,
    ) -> None: ...
    @property
    def name(self) -> str: ...
    async def call_async(self, func: Callable[[], Awaitable[_T]]) -> _T: ...
