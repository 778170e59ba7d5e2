"""The spans of a job's road: one trace where they belong together, and no text of anybody."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import INVALID_SPAN, NonRecordingSpan, SpanContext, SpanKind, StatusCode, use_span

from headrace_shared import telemetry
from headrace_shared.ids import DeliveryId, Lane, Tenant, new_job_id
from headrace_shared.job import ClaimedJob
from headrace_shared.money import NanoUSD
from headrace_shared.outcome import (
    ErrorClass,
    Failed,
    Failure,
    Outcome,
    Retry,
    Snoozed,
    Succeeded,
    WaitReason,
)
from headrace_shared.request import Endpoint
from headrace_shared.routes import Target
from headrace_shared.store.deliveries import ClaimedDelivery
from headrace_shared.telemetry_names import LATEST, V1_41, gen_ai_names
from headrace_shared.testing.jobs import claimed_job
from headrace_shared.usage import Usage

LANE = Lane("batch")
TARGET = Target("openai", "gpt-4o-mini")
USAGE = Usage(100, 40, 20, 5, 3)
PROMPT = "the quick brown canary"
LATEST_OPT_IN = "messaging,gen_ai_latest_experimental"


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    telemetry.install(provider)
    yield exporter
    telemetry.install(None)


def claimed(traceparent: str | None, *, attempts: int = 0, waited: timedelta = timedelta(0)) -> ClaimedJob:
    job = claimed_job(f'{{"messages": "{PROMPT}"}}'.encode(), lane=LANE)
    return replace(job, attempts=attempts, waited=waited, traceparent=traceparent)


def delivery(traceparent: str | None, attempt: int = 1) -> ClaimedDelivery:
    url = "https://hook.example.com:8443/canary-token"
    receiver = "hook.example.com:8443"
    now = datetime.now(UTC)
    return ClaimedDelivery(
        DeliveryId(uuid4()), 1, Tenant("acme"), url, receiver, f'"{PROMPT}"', traceparent, attempt, now
    )


def make_call() -> None:
    with telemetry.call_span(TARGET, Endpoint.CHAT_COMPLETIONS, host="api.openai.com", port=443) as call:
        call.answered(USAGE, "stop", response_model="gpt-4o-mini-2024", request_id="req_1", cost=NanoUSD(7))


def take_the_road() -> None:
    with telemetry.producer_span(LANE, job_id=new_job_id()) as traceparent:
        pass
    with telemetry.consumer_span(claimed(traceparent)) as run:
        make_call()
        run.ended(Succeeded())
    with telemetry.callback_span(delivery(traceparent)) as callback:
        callback.answered(200)


def finished(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


def trace_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return int(span.context.trace_id)


def id_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return int(span.context.span_id)


def test_a_job_that_ran_at_once_is_one_trace(spans: InMemorySpanExporter) -> None:
    take_the_road()
    found = finished(spans)
    assert {name: span.kind for name, span in found.items()} == {
        "send batch": SpanKind.PRODUCER,
        "process batch": SpanKind.CONSUMER,
        "chat gpt-4o-mini": SpanKind.CLIENT,
        "POST callback": SpanKind.CLIENT,
    }
    parents = {name: span.parent.span_id if span.parent else None for name, span in found.items()}
    assert parents == {
        "send batch": None,
        "process batch": id_of(found["send batch"]),
        "chat gpt-4o-mini": id_of(found["process batch"]),
        "POST callback": id_of(found["send batch"]),
    }
    assert len({trace_of(span) for span in found.values()}) == 1


@pytest.mark.parametrize(
    ("attempts", "waited", "mode", "linked"),
    [
        (0, timedelta(minutes=9), telemetry.TraceMode.PARENT, False),
        (0, timedelta(minutes=10), telemetry.TraceMode.PARENT, True),
        (1, timedelta(0), telemetry.TraceMode.PARENT, True),
        (0, timedelta(0), telemetry.TraceMode.LINK, True),
    ],
)
def test_a_late_or_repeated_run_is_linked(
    spans: InMemorySpanExporter,
    attempts: int,
    waited: timedelta,
    mode: telemetry.TraceMode,
    linked: bool,  # noqa: FBT001
) -> None:
    with telemetry.producer_span(LANE) as traceparent:
        pass
    # Whatever is active in the worker has no part in the trace of a run.
    with telemetry.producer_span(Lane("other")):
        job = claimed(traceparent, attempts=attempts, waited=waited)
        with telemetry.consumer_span(job, mode=mode):
            pass
    sent, run = finished(spans)["send batch"], finished(spans)["process batch"]
    assert [link.context.span_id for link in run.links] == ([id_of(sent)] if linked else [])
    assert (trace_of(run) == trace_of(sent)) is not linked
    assert (run.parent is None) is linked


def test_a_repeated_callback_is_linked_and_carries_its_own_traceparent(spans: InMemorySpanExporter) -> None:
    with telemetry.producer_span(LANE) as traceparent:
        pass
    with telemetry.callback_span(delivery(traceparent, attempt=2)) as callback:
        callback.failed("status", status=503)
    span = finished(spans)["POST callback"]
    assert (callback.traceparent or "").startswith(f"00-{trace_of(span):032x}-{id_of(span):016x}-")
    assert [link.context.trace_id for link in span.links] == [trace_of(finished(spans)["send batch"])]
    assert span.attributes is not None
    assert span.attributes["error.type"] == "status"
    assert span.attributes["http.response.status_code"] == 503


@pytest.mark.parametrize("traceparent", [None, "", "nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
def test_a_traceparent_that_is_none_begins_a_trace(
    spans: InMemorySpanExporter, traceparent: str | None
) -> None:
    with telemetry.consumer_span(claimed(traceparent)):
        pass
    span = finished(spans)["process batch"]
    assert span.parent is None
    assert not span.links


@pytest.mark.parametrize(
    ("outcome", "error_type"),
    [
        (Succeeded(), None),
        (Snoozed(timedelta(0), WaitReason.BUDGET), None),
        (Snoozed(timedelta(0), WaitReason.LOST_LEASE), "lost_lease"),
        (Retry(timedelta(0), Failure(ErrorClass.RATE_LIMITED, PROMPT)), "rate_limited"),
        (Failed(Failure(ErrorClass.BAD_REQUEST, PROMPT)), "bad_request"),
    ],
)
def test_a_runs_span_says_how_it_ended(
    spans: InMemorySpanExporter, outcome: Outcome, error_type: str | None
) -> None:
    with telemetry.consumer_span(claimed(None)) as run:
        run.ended(outcome)
    span = finished(spans)["process batch"]
    assert span.attributes is not None
    assert span.attributes.get("error.type") == error_type
    assert (span.status.status_code is StatusCode.ERROR) is (error_type is not None)


def test_no_text_of_a_prompt_an_error_or_a_callback_gets_into_a_span(
    spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SEMCONV_STABILITY_OPT_IN", LATEST_OPT_IN)
    take_the_road()
    with pytest.raises(ValueError, match=PROMPT), telemetry.call_span(TARGET, Endpoint.EMBEDDINGS):
        raise ValueError(PROMPT)
    with telemetry.consumer_span(claimed(None)) as run:
        run.ended(Failed(Failure(ErrorClass.BAD_REQUEST, PROMPT)))
    exported = "".join(span.to_json() for span in spans.get_finished_spans())
    assert '"error.type": "ValueError"' in exported
    assert "canary" not in exported


@pytest.mark.parametrize(
    ("opt_in", "cache_write"),
    [
        ("", "gen_ai.usage.cache_creation.input_tokens"),
        (LATEST_OPT_IN, "gen_ai.usage.cache_write.input_tokens"),
    ],
)
def test_a_call_is_named_as_the_chosen_release_says(
    spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch, opt_in: str, cache_write: str
) -> None:
    monkeypatch.setenv("OTEL_SEMCONV_STABILITY_OPT_IN", opt_in)
    make_call()
    span = finished(spans)["chat gpt-4o-mini"]
    assert dict(span.attributes or {}) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "gpt-4o-mini",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.response.model": "gpt-4o-mini-2024",
        "gen_ai.usage.cache_read.input_tokens": 40,
        "gen_ai.usage.input_tokens": 100,
        "gen_ai.usage.output_tokens": 20,
        "gen_ai.usage.reasoning.output_tokens": 5,
        "headrace.cost_nano_usd": 7,
        "headrace.provider.request_id": "req_1",
        "server.address": "api.openai.com",
        "server.port": 443,
        cache_write: 3,
    }


def test_the_newest_names_are_an_option() -> None:
    assert gen_ai_names({}) is V1_41
    assert gen_ai_names({"OTEL_SEMCONV_STABILITY_OPT_IN": "http"}) is V1_41
    assert gen_ai_names({"OTEL_SEMCONV_STABILITY_OPT_IN": "http, gen_ai_latest_experimental"}) is LATEST


def test_without_an_sdk_a_callers_trace_is_handed_on() -> None:
    caller = NonRecordingSpan(SpanContext(1, 2, is_remote=True))
    brought = f"00-{1:032x}-{2:016x}-00"
    with use_span(caller), telemetry.producer_span(LANE) as traceparent:
        assert traceparent == brought
    with telemetry.consumer_span(claimed(brought)) as run, telemetry.callback_span(delivery(brought)) as call:
        run.ended(Succeeded())
        assert call.traceparent == brought
        assert telemetry.current_traceparent() is None
    with use_span(INVALID_SPAN), telemetry.producer_span(LANE) as traceparent:
        assert traceparent is None
