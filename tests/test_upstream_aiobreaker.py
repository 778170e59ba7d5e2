"""What `headrace_workers.breaker` relies on in aiobreaker; another version may do otherwise."""

from datetime import UTC, datetime, timedelta
from importlib.metadata import version

import pytest
from aiobreaker import CircuitBreaker, CircuitBreakerError, CircuitBreakerListener, CircuitBreakerState
from aiobreaker.storage.base import CircuitBreakerStorage

LONG_AGO = datetime.fromtimestamp(0, UTC).replace(tzinfo=None)


class Storage(CircuitBreakerStorage):
    """Writes down what it is asked."""

    def __init__(self) -> None:
        super().__init__("storage")
        self.current = CircuitBreakerState.CLOSED
        self.tripped = 0
        self.asked: list[str] = []

    @property
    def state(self) -> CircuitBreakerState:
        return self.current

    @state.setter
    def state(self, state: CircuitBreakerState) -> None:
        self.asked.append(f"-> {state.name}")
        self.current = state

    def increment_counter(self) -> None:
        self.asked.append("increment")

    def reset_counter(self) -> None:
        self.asked.append("reset")

    @property
    def counter(self) -> int:
        return self.tripped

    @property
    def opened_at(self) -> datetime:
        return LONG_AGO

    @opened_at.setter
    def opened_at(self, date_time: datetime) -> None:
        self.asked.append("opened")


class Listener(CircuitBreakerListener):
    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def success(self, breaker: CircuitBreaker) -> None:
        self._storage.asked.append("success")

    def state_change(self, breaker: CircuitBreaker, old: object, new: object) -> None:
        before, after = (getattr(state, "state", state) for state in (old, new))
        assert isinstance(before, CircuitBreakerState)
        assert isinstance(after, CircuitBreakerState)
        self._storage.asked.append(f"{before.name} to {after.name}")


@pytest.fixture
def storage() -> Storage:
    return Storage()


@pytest.fixture
def circuit(storage: Storage) -> CircuitBreaker:
    return CircuitBreaker(
        fail_max=1,
        timeout_duration=timedelta(0),
        state_storage=storage,
        listeners=[Listener(storage)],
        name="name",
    )


class Unwell(Exception):
    pass


async def answer() -> str:
    return "answer"


async def fail() -> str:
    raise Unwell


def test_it_is_the_version_that_was_read() -> None:
    assert version("aiobreaker") == "1.2.0"


async def test_an_answer_resets_the_counter_and_tells_the_listeners(
    circuit: CircuitBreaker, storage: Storage
) -> None:
    assert await circuit.call_async(answer) == "answer"
    assert storage.asked == ["reset", "success"]


async def test_a_failure_below_the_mark_is_counted_and_raised_as_it_is(
    circuit: CircuitBreaker, storage: Storage
) -> None:
    with pytest.raises(Unwell):
        await circuit.call_async(fail)
    assert storage.asked == ["increment"]


async def test_a_failure_at_the_mark_opens_and_is_the_cause_of_what_is_raised(
    circuit: CircuitBreaker, storage: Storage
) -> None:
    storage.tripped = 1
    with pytest.raises(CircuitBreakerError) as raised:
        await circuit.call_async(fail)
    assert isinstance(raised.value.__cause__, Unwell)
    assert storage.asked == ["increment", "opened", "CLOSED to OPEN", "-> OPEN"]


async def test_a_call_through_an_open_circuit_is_a_trial_that_closes_it(
    circuit: CircuitBreaker, storage: Storage
) -> None:
    storage.current = CircuitBreakerState.OPEN
    assert await circuit.call_async(answer) == "answer"
    assert [word for word in storage.asked if word.startswith("->")] == ["-> HALF_OPEN", "-> CLOSED"]
    assert storage.asked[-1] == "success"
    assert storage.asked.count("reset") == 2, "closing resets as well: answers are counted by the listener"


async def test_a_trial_that_fails_opens_it_again(circuit: CircuitBreaker, storage: Storage) -> None:
    storage.current = CircuitBreakerState.OPEN
    with pytest.raises(CircuitBreakerError) as raised:
        await circuit.call_async(fail)
    assert isinstance(raised.value.__cause__, Unwell)
    assert [word for word in storage.asked if word.startswith("->")] == ["-> HALF_OPEN", "-> OPEN"]


async def test_a_cancelled_trial_leaves_it_half_open(circuit: CircuitBreaker, storage: Storage) -> None:
    async def cancelled() -> str:
        raise SystemExit  # like CancelledError no Exception, and not the test's own end

    storage.current = CircuitBreakerState.OPEN
    with pytest.raises(SystemExit):
        await circuit.call_async(cancelled)
    assert storage.current is CircuitBreakerState.HALF_OPEN


async def test_a_state_that_another_wrote_is_taken_over(circuit: CircuitBreaker, storage: Storage) -> None:
    storage.current = CircuitBreakerState.OPEN
    await circuit.call_async(answer)
    assert storage.asked[:2] == ["CLOSED to OPEN", "OPEN to HALF_OPEN"]
    storage.current = CircuitBreakerState.HALF_OPEN
    storage.asked.clear()
    await circuit.call_async(answer)
    assert storage.asked[0] == "CLOSED to HALF_OPEN"
