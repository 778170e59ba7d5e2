"""Breakers by an operator's hand: what they keep back, who hears of it, and what closes them."""

from collections.abc import Callable
from datetime import timedelta

import pytest
from command_line import Command

from headrace_shared.configuration import Configuration
from headrace_shared.dispatch import breakers
from headrace_shared.dispatch.connection import Redis
from headrace_shared.dispatch.dispatch import Dispatch
from headrace_shared.ids import HoldId, WorkerId
from headrace_shared.job import JobState
from headrace_shared.routes import Target
from headrace_shared.store import claims, pauses
from headrace_shared.store.configurations import Versioned
from headrace_shared.store.pool import Pool
from headrace_shared.testing.clock import Clock
from headrace_shared.testing.jobs import MODEL, Jobs
from headrace_shared.testing.simulated_provider import SimulatedProvider
from headrace_shared.testing.spending import flush
from headrace_workers.breaker import Breaker, Breakers, NotNow, Permit
from headrace_workers.configured import Configured
from headrace_workers.reaper import Reaper
from headrace_workers.testing import running_worker

pytestmark = pytest.mark.usefixtures("environment")

TARGET = Target("openai", MODEL)
NAME = str(TARGET)
GATE = f"route:{MODEL}|breaker"
MINUTE = timedelta(minutes=1)
LONG = timedelta(days=2)
SOON = timedelta(seconds=5)
"""What a process waits at most before it asks again about a breaker that is held open."""


@pytest.fixture
def process(dispatch: Dispatch, pool: Pool) -> Callable[[], Breaker]:
    """The target's breaker in another process of the fleet."""
    document = {"breaker": {"minimum_calls": 4, "window": "60s", "cooldown": "10s", "probe_lease": "30s"}}
    configured = Configured(pool, Versioned(0, Configuration.from_document(document)))
    return lambda: Breakers(dispatch, configured).of(TARGET)


async def ask(breaker: Breaker, owner: str = "job:1:1") -> Permit | NotNow:
    """Ask for leave, as one that has heard how the fleet stands."""
    await breaker.share()
    return await breaker.admit(HoldId(owner))


async def test_one_that_is_open_by_hand_gives_leave_to_nobody_until_it_is_closed_by_hand(
    command: Command, dispatch: Dispatch, clock: Clock, process: Callable[[], Breaker]
) -> None:
    done = await command("breakers", "open", NAME, "--json")
    assert done.answer == {"target": NAME, "state": "open", "until": None}
    assert await dispatch.gates() == [GATE]
    for _ in range(2):
        found = await ask(process())
        assert isinstance(found, NotNow)
        assert timedelta(0) < found.delay <= SOON
        await clock.advance(LONG)
    assert (await command("breakers", "close", NAME)).out == f"The breaker of {NAME} is closed.\n"
    assert await ask(process()) == Permit()
    assert await dispatch.gates() == []
    assert (await command("breakers", "close", NAME)).out == f"The breaker of {NAME} was not open.\n"


async def test_a_probe_that_was_out_does_not_close_what_a_hand_opened_meanwhile(
    command: Command, redis: Redis, clock: Clock
) -> None:
    await breakers.open_(redis, TARGET, MINUTE, None)
    await clock.advance(MINUTE)
    assert await breakers.probe(redis, TARGET, "prober", MINUTE) == breakers.Granted()
    await command("breakers", "open", NAME)
    assert not await breakers.close(redis, TARGET, "prober")
    assert await breakers.open_(redis, TARGET, timedelta(seconds=1), "prober") == (False, SOON)
    view = await breakers.view(redis, TARGET)
    assert (view.is_open, view.by_hand, view.probing) == (True, True, False)


async def test_after_its_time_a_probe_goes_and_closes_it(
    command: Command, redis: Redis, clock: Clock
) -> None:
    await command("breakers", "open", NAME, "--for", "1m")
    assert isinstance(await breakers.probe(redis, TARGET, "prober", MINUTE), breakers.Wait)
    await clock.advance(MINUTE)
    assert await breakers.probe(redis, TARGET, "prober", MINUTE) == breakers.Granted()
    [shown] = (await command("breakers", "show", NAME, "--json")).rows("breakers")
    assert (shown["state"], shown["by_hand"]) == ("probing", False)
    assert await breakers.close(redis, TARGET, "prober")
    assert not (await breakers.view(redis, TARGET)).is_open


async def test_what_a_wiped_redis_forgot_is_held_open_again(
    command: Command, redis: Redis, dispatch: Dispatch, reaper: Reaper
) -> None:
    await command("breakers", "open", NAME)
    await flush(redis)
    await reaper.turn()
    assert (await breakers.view(redis, TARGET)).by_hand
    assert await dispatch.gates() == [GATE]
    await command("breakers", "close", NAME)
    await reaper.turn()
    assert (await dispatch.gates(), (await breakers.view(redis, TARGET)).is_open) == ([], False)


async def test_one_that_is_closed_by_hand_while_it_is_put_back_stays_closed(
    pool: Pool, redis: Redis, dispatch: Dispatch
) -> None:
    held = await pauses.pause(pool, f"target:{NAME}", None)
    answers = [[held], []]

    async def paused() -> list[pauses.Pause]:
        return answers.pop(0)

    await Breakers(dispatch, await Configured.load(pool)).hold_open(paused)
    assert (await dispatch.gates(), (await breakers.view(redis, TARGET)).is_open) == ([], False)


async def test_jobs_wait_in_their_queue_and_go_on_when_it_is_closed(
    pool: Pool, dispatch: Dispatch, command: Command, provider: SimulatedProvider
) -> None:
    jobs = Jobs(pool, dispatch)
    await command("breakers", "open", NAME)
    async with running_worker():
        kept = await jobs.add(3)
        others = await jobs.add(2, model="gpt-4o")
        await jobs.ended(others)
        assert {(await jobs.row(job_id))["run"] for job_id in kept} == {0}
        await command("breakers", "close", NAME)
        endings = await jobs.ended(kept)
    assert {ending.job.state for ending in endings} == {JobState.SUCCEEDED}
    assert provider.books.total.requests == 5


async def test_the_command_shows_what_calls_came_to_and_changes_nothing(
    command: Command, redis: Redis
) -> None:
    assert "no breakers yet" in (await command("breakers", "show")).out
    await breakers.record(redis, TARGET, timedelta(seconds=30), 15, 5)
    other = Target("openai", "gpt-4o")
    await breakers.open_(redis, other, MINUTE, None)
    rows = (await command("breakers", "show", "--json")).rows("breakers")
    assert [(row["target"], row["state"], row["calls"], row["failure_rate"]) for row in rows] == [
        (str(other), "open", 0, None),
        (NAME, "closed", 20, 0.25),
    ]
    assert 0 < float(str(rows[0]["probe_in_seconds"])) <= MINUTE.total_seconds()
    text = (await command("breakers", "show")).out
    assert "25%" in text
    assert "a probe may go in" in text
    await command("breakers", "open", NAME)
    assert f"{NAME}" in (await command("breakers", "show", NAME)).out
    assert "until closed by hand" in (await command("breakers", "show", NAME)).out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["open", "gpt-4o"], "'gpt-4o' is not a target: it must be named provider/model."),
        (["open", "opnai/gpt-4o"], "There is no provider 'opnai': the providers are openai."),
        (["show", "opnai/gpt-4o"], "There is no provider"),
        (["open", NAME, "--for", "0s"], "--for: must be longer than nothing."),
    ],
)
async def test_what_is_no_target_is_refused_in_a_sentence(
    command: Command, pool: Pool, arguments: list[str], says: str
) -> None:
    done = await command("breakers", *arguments)
    assert (done.code, done.out) == (2, "")
    assert says in done.err
    assert await pauses.in_force(pool) == []


async def test_without_redis_it_is_written_down_and_said(
    command: Command, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_REDIS_URL", "redis://127.0.0.1:1")
    done = await command("breakers", "open", NAME)
    assert (done.code, "Workers hear of it later" in done.err) == (0, True)
    assert [one.scope for one in await pauses.in_force(pool)] == [f"target:{NAME}"]


async def test_a_breaker_that_is_held_open_is_no_pause_of_jobs(pool: Pool, dispatch: Dispatch) -> None:
    await pauses.pause(pool, f"target:{NAME}", None)
    ids = await Jobs(pool, dispatch).add(1)
    assert len((await claims.claim_jobs(pool, ids, WorkerId("w"), MINUTE)).jobs) == 1
