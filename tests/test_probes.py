"""The worker's HTTP listener, asked over HTTP."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from aiohttp import ClientSession
from prometheus_client.parser import text_string_to_metric_families

from headrace_shared.errors import InvalidConfiguration
from headrace_shared.ids import WorkerId
from headrace_shared.settings import Settings
from headrace_workers.probes import Probes
from headrace_workers.telemetry import setup

ON_A_FREE_PORT = Settings(metrics_port=0)


@pytest_asyncio.fixture
async def http() -> AsyncIterator[ClientSession]:
    async with ClientSession() as session:
        yield session


async def ask(http: ClientSession, probes: Probes, path: str, accept: str = "*/*") -> tuple[int, str]:
    async with http.get(f"http://127.0.0.1:{probes.port}{path}", headers={"Accept": accept}) as response:
        return response.status, await response.text()


async def test_a_worker_is_ready_when_it_says_so(http: ClientSession) -> None:
    reason: str | None = "starting: PostgreSQL does not answer"

    def ready() -> str | None:
        return reason

    async with Probes(ON_A_FREE_PORT, ready) as probes:
        assert await ask(http, probes, "/readyz") == (503, "starting: PostgreSQL does not answer\n")
        assert await ask(http, probes, "/healthz") == (200, "alive\n")
        reason = None
        assert await ask(http, probes, "/readyz") == (200, "ready\n")
        reason = "stopping"
        assert await ask(http, probes, "/readyz") == (503, "stopping\n")
        assert await ask(http, probes, "/healthz") == (200, "alive\n")


async def test_metrics_can_be_read_in_both_formats(http: ClientSession) -> None:
    telemetry = setup(ON_A_FREE_PORT, WorkerId("w1"))
    telemetry.metrics.leases_lost(3)
    async with Probes(ON_A_FREE_PORT, lambda: None, telemetry.registry) as probes:
        status, text = await ask(http, probes, "/metrics")
        as_open_metrics = await ask(http, probes, "/metrics", "application/openmetrics-text; version=1.0.0")
    families = text_string_to_metric_families(text)
    found = {sample.name: sample.value for family in families for sample in family.samples}
    assert status == 200
    assert found["headrace_leases_lost_total"] == 3
    assert found["process_resident_memory_bytes"] > 0
    assert as_open_metrics[0] == 200
    assert as_open_metrics[1].endswith("# EOF\n")


async def test_a_gauge_that_cannot_be_read_costs_no_other(http: ClientSession) -> None:
    telemetry = setup(ON_A_FREE_PORT, WorkerId("w1"))

    def broken() -> None:
        raise ZeroDivisionError

    telemetry.metrics.watch(broken)
    telemetry.metrics.watch(lambda: telemetry.metrics.pool_in_use(4))
    async with Probes(ON_A_FREE_PORT, lambda: None, telemetry.registry) as probes:
        status, text = await ask(http, probes, "/metrics")
    assert status == 200
    assert "headrace_db_pool_in_use 4.0" in text


async def test_without_a_registry_there_are_no_metrics(http: ClientSession) -> None:
    async with Probes(ON_A_FREE_PORT, lambda: None) as probes:
        assert (await ask(http, probes, "/metrics"))[0] == 404


async def test_it_is_off_without_a_port() -> None:
    async with Probes(Settings(), lambda: None) as probes:
        assert probes.port is None


async def test_a_taken_port_is_one_sentence() -> None:
    async with Probes(ON_A_FREE_PORT, lambda: None) as first:
        taken = Settings(metrics_port=first.port)
        with pytest.raises(
            InvalidConfiguration, match=r"HEADRACE_METRICS_PORT: 127\.0\.0\.1 port \d+ cannot"
        ):
            async with Probes(taken, lambda: None):
                pass


async def test_the_port_is_free_again_afterwards() -> None:
    async with Probes(ON_A_FREE_PORT, lambda: None) as first:
        settings = Settings(metrics_port=first.port)
    async with Probes(settings, lambda: None) as second:
        assert second.port == settings.metrics_port
