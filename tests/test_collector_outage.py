"""A collector of spans that is down, refuses or hangs costs a worker neither time nor memory."""

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from headrace_shared.ids import Lane, WorkerId
from headrace_shared.settings import Settings
from headrace_shared.telemetry import producer_span
from headrace_workers.telemetry import setup

QUEUE = 64
BATCH = 16


class Collector:
    """Takes requests, and answers none before it is told to."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.answering = asyncio.Event()
        self.left_without_an_answer = False
        self.names: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
                body = await reader.readexactly(length)
                self.asked.set()
                await self._until_answering(reader)
                self._keep(body)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _until_answering(self, reader: asyncio.StreamReader) -> None:
        leaving = asyncio.create_task(reader.read(1))
        answering = asyncio.create_task(self.answering.wait())
        await asyncio.wait((leaving, answering), return_when=asyncio.FIRST_COMPLETED)
        if leaving.done():
            self.left_without_an_answer = True
        leaving.cancel()
        await answering

    def _keep(self, body: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(body)
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.names += [span.name for span in scope.spans]


@pytest_asyncio.fixture
async def collector(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Collector]:
    made = Collector()
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    point_at(monkeypatch, server.sockets[0].getsockname()[1])
    yield made
    made.answering.set()
    server.close()


def point_at(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", str(QUEUE))
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", str(BATCH))


async def assert_still_asking(collector: Collector) -> None:
    """Whoever waited for the collector is still waiting: nobody has given up meanwhile."""
    await asyncio.wait_for(collector.asked.wait(), 10)
    for _ in range(10):
        await asyncio.sleep(0)
    assert not collector.left_without_an_answer
    assert not collector.names


def span(number: int) -> None:
    with producer_span(Lane(f"lane-{number}")):
        pass


async def test_spans_end_while_a_collector_hangs_and_only_the_newest_are_kept(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace_workers.telemetry.FLUSH_SECONDS", 60.0)
    telemetry = setup(Settings(), WorkerId("w1"))
    span(0)
    await assert_still_asking(collector)
    for number in range(1, 1000):
        span(number)
    await assert_still_asking(collector)
    collector.answering.set()
    await telemetry.shutdown()
    kept = [f"send lane-{number}" for number in (0, *range(1000 - QUEUE, 1000))]
    assert sorted(collector.names) == sorted(kept)


async def test_a_shutdown_does_not_wait_for_a_collector_that_hangs(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace_workers.telemetry.FLUSH_SECONDS", 0.05)
    telemetry = setup(Settings(), WorkerId("w1"))
    span(0)
    await assert_still_asking(collector)
    await telemetry.shutdown()
    await assert_still_asking(collector)
    with producer_span(Lane("after")) as traceparent:
        assert traceparent is None
    await telemetry.shutdown()


async def test_spans_end_while_a_collector_is_down(
    monkeypatch: pytest.MonkeyPatch, unused_tcp_port: int
) -> None:
    monkeypatch.setattr("headrace_workers.telemetry.FLUSH_SECONDS", 0.05)
    point_at(monkeypatch, unused_tcp_port)
    telemetry = setup(Settings(), WorkerId("w1"))
    for number in range(1000):
        span(number)
    with producer_span(Lane("batch")) as traceparent:
        assert traceparent is not None
    await telemetry.shutdown()


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_nothing_is_sent_unless_a_collector_is_named(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    before = threading.active_count()
    telemetry = setup(Settings(), WorkerId("w1"))
    assert telemetry.spans is None
    assert threading.active_count() == before
    with producer_span(Lane("batch")) as traceparent:
        assert traceparent is None
