"""A configuration that is applied while workers run holds from their next claim on."""

import pytest

from headrace_shared.dispatch.dispatch import Dispatch
from headrace_shared.ids import Lane
from headrace_shared.job import JobState
from headrace_shared.store.pool import Pool
from headrace_shared.testing.jobs import MODEL, Jobs
from headrace_shared.testing.simulated_provider import SimulatedProvider
from headrace_workers.configured import Configured
from headrace_workers.testing import running_worker

pytestmark = pytest.mark.usefixtures("environment")


@pytest.fixture
def jobs(pool: Pool, dispatch: Dispatch) -> Jobs:
    return Jobs(pool, dispatch)


async def test_prices_hold_at_the_next_claim(jobs: Jobs, provider: SimulatedProvider) -> None:
    async with running_worker():
        (before,) = await jobs.add()
        await jobs.ended([before])
        await jobs.configure(
            {"prices": {f"openai/{MODEL}": {"input": "0", "output": "0", "request": "0.25"}}}
        )
        (after,) = await jobs.add()
        (ending,) = await jobs.ended([after])
    assert ending.bill.cost == 250_000_000
    (call,) = await jobs.calls(after)
    assert call["price_version"] == "configuration"
    assert (await jobs.calls(before))[0]["price_version"].startswith("genai-prices")


async def test_a_route_moves_to_another_provider_and_back(
    jobs: Jobs, provider: SimulatedProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTHER_API_KEY", "sk-other")
    async with SimulatedProvider() as other, running_worker():
        (first,) = await jobs.add(model="mine-1", max_attempts=1)
        await jobs.ended([first])
        await jobs.configure(
            {
                "providers": {"other": {"base_url": other.url, "priced_as": "openai"}},
                "routes": {"mine-1": {"targets": [{"provider": "other", "model": "gpt-4o"}]}},
            }
        )
        (second,) = await jobs.add(model="mine-1")
        (ending,) = await jobs.ended([second])
        assert ending.answer is not None
        assert (ending.answer.provider, ending.answer.model) == ("other", "gpt-4o")
        assert other.books.of(model="gpt-4o").answered == 1
        await jobs.configure({"routes": {"mine-1": {"targets": [{"provider": "openai", "model": MODEL}]}}})
        (third,) = await jobs.add(model="mine-1")
        (ending,) = await jobs.ended([third])
    assert ending.answer is not None
    assert (ending.answer.provider, ending.answer.model) == ("openai", MODEL)
    assert provider.books.of(model=MODEL).answered == 1
    assert (await jobs.ending(first)).job.error_class == "unknown_price"


async def test_jobs_that_were_enqueued_before_run_under_what_holds_now(
    jobs: Jobs, provider: SimulatedProvider
) -> None:
    ids = await jobs.add(3)
    await jobs.configure({"defaults": {"any_model": False}})
    async with running_worker():
        endings = await jobs.ended(ids)
    assert {ending.job.error_class for ending in endings} == {"no_route"}
    assert provider.books.total.requests == 0


async def test_a_configuration_that_this_code_cannot_read_stops_nobody(
    jobs: Jobs, provider: SimulatedProvider, pool: Pool
) -> None:
    """Of a newer release, say: jobs go on under the version that is here."""
    ids = await jobs.add(3)
    async with running_worker():
        await jobs.ended(ids)
        more = await jobs.add(3)
        await pool.execute(
            "INSERT INTO headrace.configurations (document, source, applied_at)"
            " VALUES ('{\"of_the_future\": 1}', 'test', headrace.now())"
        )
        endings = await jobs.ended(more)
    assert {ending.job.state for ending in endings} == {JobState.SUCCEEDED}
    assert {ending.job.crashes for ending in endings} == {0}


async def test_a_lane_that_is_added_is_served(jobs: Jobs, provider: SimulatedProvider) -> None:
    async with running_worker():
        (first,) = await jobs.add()
        await jobs.ended([first])
        await jobs.configure({"lanes": {"night": 1}})
        night = await jobs.add(3, lane=Lane("night"))
        endings = await jobs.ended(night)
    assert {ending.job.state for ending in endings} == {JobState.SUCCEEDED}


async def test_only_a_newer_version_is_followed(jobs: Jobs, pool: Pool) -> None:
    configured = await Configured.load(pool)
    assert configured.now.version == 0
    version = await jobs.configure({"retries": {"max_attempts": 3}})
    await configured.follow(version)
    assert (configured.now.version, configured.now.retries.max_attempts) == (version, 3)
    present = configured.now
    await configured.follow(version - 1)
    assert configured.now is present
