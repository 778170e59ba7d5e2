"""The spans on a job's road: sent, processed, called, called back.

Only the API of OpenTelemetry is needed. Where no SDK is configured nothing is recorded,
and a trace that a caller brings along is handed on all the same. No text of a prompt or
an answer, no address of a callback and no message of an error gets into a span.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from enum import StrEnum
from typing import assert_never

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode, Tracer, TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from headrace_shared import telemetry_names as names
from headrace_shared.ids import JobId, Lane
from headrace_shared.job import ClaimedJob
from headrace_shared.money import NanoUSD
from headrace_shared.outcome import (
    Cancelled,
    ErrorClass,
    Expired,
    Failed,
    Outcome,
    Retry,
    Snoozed,
    Succeeded,
    WaitReason,
)
from headrace_shared.request import Endpoint
from headrace_shared.routes import Target
from headrace_shared.store.deliveries import ClaimedDelivery
from headrace_shared.usage import Usage

LINK_AFTER = timedelta(minutes=10)
"""A run that begins later than this after it was due has a trace of its own."""

_Attributes = Mapping[str, str | bool | int | float | Sequence[str]]
_propagator = TraceContextTextMapPropagator()


class TraceMode(StrEnum):
    """How the trace of a run hangs together with that of its enqueueing."""

    PARENT = "parent"
    """One trace for a first attempt that did not wait long; a link otherwise."""
    LINK = "link"


class _Source:
    """Where spans go: to the provider that was installed, else to the process's own."""

    def __init__(self) -> None:
        self.installed: TracerProvider | None = None
        self._provider: TracerProvider | None = None
        self._tracer: Tracer | None = None

    def tracer(self) -> Tracer | None:
        provider = self.installed or trace.get_tracer_provider()
        if provider is not self._provider:
            self._provider, self._tracer = provider, _tracer_of(provider)
        return self._tracer


def _tracer_of(provider: TracerProvider) -> Tracer | None:
    # The API's tracer that does nothing takes several microseconds a span to do it.
    if isinstance(provider, trace.ProxyTracerProvider | trace.NoOpTracerProvider):
        return None
    tracer = provider.get_tracer(names.SCOPE)
    return None if isinstance(tracer, trace.NoOpTracer) else tracer


_source = _Source()


def install(provider: TracerProvider | None) -> None:
    """Send Headrace's spans to this provider; None: to the process's own again, if it has one."""
    _source.installed = provider


def current_traceparent() -> str | None:
    """Return the W3C `traceparent` of the active span, whoever started it."""
    return _format(trace.get_current_span().get_span_context())


@contextmanager
def producer_span(
    destination: Lane, *, job_id: JobId | None = None, count: int = 1
) -> Generator[str | None, None, None]:
    """Span the saving of jobs, and yield the `traceparent` to save with them.

    Args:
        destination: the lane.
        job_id: of the job, when it is one.
        count: jobs that are saved together.

    """
    tracer = _source.tracer()
    if tracer is None:
        yield current_traceparent()
        return
    attributes = _messaging("send", destination) | {names.MESSAGING_BATCH_COUNT: count}
    if job_id is not None:
        attributes[names.MESSAGING_MESSAGE_ID] = str(job_id)
    with _span(tracer, f"send {destination}", SpanKind.PRODUCER, attributes):
        yield current_traceparent()


class JobSpan:
    """The span of one run of a job."""

    def __init__(self, span: Span) -> None:
        self._span = span

    def ended(self, outcome: Outcome) -> None:
        """Say how the run ended; a lost lease is an error of the span, other waits are none."""
        if not self._span.is_recording():
            return
        name, reason = describe(outcome)
        self._span.set_attribute(names.OUTCOME, name)
        lost = isinstance(outcome, Snoozed) and outcome.reason is WaitReason.LOST_LEASE
        if lost or isinstance(outcome, Failed | Retry | Expired):
            _fail(self._span, reason)


@contextmanager
def consumer_span(job: ClaimedJob, *, mode: TraceMode = TraceMode.PARENT) -> Generator[JobSpan, None, None]:
    """Span one run of a job, under its enqueueing's trace or linked to it."""
    tracer = _source.tracer()
    if tracer is None:
        yield _SILENT_JOB
        return
    attributes = _messaging("process", job.queue.lane) | {
        names.MESSAGING_MESSAGE_ID: str(job.id),
        names.RUN: job.run,
        names.ATTEMPTS: job.attempts,
        names.ROUTE: job.queue.route,
        names.TENANT: job.queue.tenant,
        names.QUEUE_WAIT: job.waited.total_seconds(),
    }
    together = mode is TraceMode.PARENT and job.attempts == 0 and job.waited < LINK_AFTER
    origin = _origin(job.traceparent, together=together)
    name = f"process {job.queue.lane}"
    with _span(tracer, name, SpanKind.CONSUMER, attributes, origin) as span:
        yield JobSpan(span)


class CallSpan:
    """The span of one call to a provider."""

    def __init__(self, span: Span, cache_write_tokens: str) -> None:
        self._span = span
        self._cache_write_tokens = cache_write_tokens

    def answered(
        self,
        usage: Usage | None,
        finish: str,
        *,
        response_model: str | None = None,
        response_id: str | None = None,
        request_id: str | None = None,
        cost: NanoUSD | None = None,
    ) -> None:
        """Say what the answer used, and why it ended, in the provider's word for it."""
        if not self._span.is_recording():
            return
        found: dict[str, str | int | None] = {
            names.GEN_AI_RESPONSE_MODEL: response_model,
            names.GEN_AI_RESPONSE_ID: response_id,
            names.REQUEST_ID: request_id,
            names.CALL_COST: cost,
        }
        self._span.set_attributes({name: value for name, value in found.items() if value is not None})
        self._span.set_attribute(names.GEN_AI_FINISH_REASONS, [finish])
        if usage is not None:
            self._span.set_attributes(self._tokens(usage))

    def failed(self, error_class: ErrorClass, *, status: int | None = None) -> None:
        """Say why there is no result, and with which HTTP status, where there was one."""
        _fail(self._span, error_class)
        if status is not None:
            self._span.set_attribute(names.HTTP_STATUS, status)

    def _tokens(self, usage: Usage) -> dict[str, int]:
        return {
            names.GEN_AI_INPUT_TOKENS: usage.prompt_tokens,
            names.GEN_AI_OUTPUT_TOKENS: usage.completion_tokens,
            names.GEN_AI_CACHE_READ_TOKENS: usage.cached_tokens,
            names.GEN_AI_REASONING_TOKENS: usage.reasoning_tokens,
            self._cache_write_tokens: usage.cache_write_tokens,
        }


@contextmanager
def call_span(
    target: Target, endpoint: Endpoint, *, host: str | None = None, port: int | None = None
) -> Generator[CallSpan, None, None]:
    """Span one call to a provider, under the active span; host and port are the provider's."""
    tracer = _source.tracer()
    if tracer is None:
        yield _SILENT_CALL
        return
    operation = names.OPERATIONS[endpoint]
    attributes: dict[str, str | int] = {
        names.GEN_AI_OPERATION: operation,
        names.GEN_AI_PROVIDER: target.provider,
        names.GEN_AI_REQUEST_MODEL: target.model,
    }
    if host is not None:
        attributes[names.SERVER_ADDRESS] = host
    if port is not None:
        attributes[names.SERVER_PORT] = port
    with _span(tracer, f"{operation} {target.model}", SpanKind.CLIENT, attributes) as span:
        yield CallSpan(span, names.gen_ai_names().cache_write_tokens)


class CallbackSpan:
    """The span of one attempt at a callback."""

    def __init__(self, span: Span, traceparent: str | None) -> None:
        self._span = span
        self.traceparent = traceparent
        """What the receiver is sent."""

    def answered(self, status: int) -> None:
        self._span.set_attribute(names.HTTP_STATUS, status)

    def failed(self, error_class: str, *, status: int | None = None) -> None:
        _fail(self._span, error_class)
        if status is not None:
            self._span.set_attribute(names.HTTP_STATUS, status)


@contextmanager
def callback_span(
    delivery: ClaimedDelivery, *, mode: TraceMode = TraceMode.PARENT
) -> Generator[CallbackSpan, None, None]:
    """Span one attempt: the first under the enqueueing's trace, the others linked to it."""
    tracer = _source.tracer()
    if tracer is None:
        yield CallbackSpan(trace.INVALID_SPAN, delivery.traceparent)
        return
    host, _, port = delivery.receiver.rpartition(":")
    attributes: dict[str, str | int] = {
        names.HTTP_METHOD: "POST",
        names.SERVER_ADDRESS: host or delivery.receiver,
        names.DELIVERY_ID: str(delivery.id),
        names.TENANT: delivery.tenant,
        names.HTTP_RESEND_COUNT: delivery.attempt - 1,
    }
    if host and port.isdecimal():
        attributes[names.SERVER_PORT] = int(port)
    together = mode is TraceMode.PARENT and delivery.attempt == 1
    origin = _origin(delivery.traceparent, together=together)
    with _span(tracer, "POST callback", SpanKind.CLIENT, attributes, origin) as span:
        yield CallbackSpan(span, current_traceparent() or delivery.traceparent)


def describe(outcome: Outcome) -> tuple[str, str]:
    """Return the name of an outcome, and its error class or the reason of its wait, or ``""``."""
    match outcome:
        case Succeeded():
            return "succeeded", ""
        case Retry(failure=failure):
            return "retry", failure.error_class
        case Snoozed(reason=reason):
            return "snoozed", reason
        case Cancelled():
            return "cancelled", ErrorClass.CANCELLED
        case Failed(failure=failure):
            return "failed", failure.error_class
        case Expired():
            return "expired", ErrorClass.EXPIRED
        case _:
            assert_never(outcome)


@contextmanager
def _span(
    tracer: Tracer,
    name: str,
    kind: SpanKind,
    attributes: _Attributes,
    origin: tuple[Context | None, Sequence[Link]] = (None, ()),
) -> Generator[Span, None, None]:
    # An exception's message may quote a prompt: only its type is told.
    with tracer.start_as_current_span(
        name,
        kind=kind,
        attributes=attributes,
        context=origin[0],
        links=origin[1],
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        try:
            yield span
        except BaseException as error:
            _fail(span, type(error).__name__)
            raise


def _fail(span: Span, error_type: str) -> None:
    span.set_status(Status(StatusCode.ERROR))
    span.set_attribute(names.ERROR_TYPE, error_type)


def _messaging(operation: str, destination: Lane) -> dict[str, str | int | float]:
    return {
        names.MESSAGING_SYSTEM: "headrace",
        names.MESSAGING_OPERATION_TYPE: operation,
        names.MESSAGING_OPERATION_NAME: operation,
        names.MESSAGING_DESTINATION: destination,
    }


def _origin(traceparent: str | None, *, together: bool) -> tuple[Context | None, Sequence[Link]]:
    """Return the context to start a span in, and its links; whatever is active has no part in it."""
    context = _propagator.extract({"traceparent": traceparent or ""}, Context())
    origin = trace.get_current_span(context).get_span_context()
    if together and origin.is_valid:
        return context, ()
    return Context(), (Link(origin),) if origin.is_valid else ()


def _format(context: SpanContext) -> str | None:
    if not context.is_valid:
        return None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


_SILENT_JOB = JobSpan(trace.INVALID_SPAN)
_SILENT_CALL = CallSpan(trace.INVALID_SPAN, "")
