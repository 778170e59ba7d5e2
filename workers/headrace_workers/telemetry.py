"""What a worker tells about itself: metrics for Prometheus, spans for a collector.

An instrument of OpenTelemetry takes six microseconds or more for a record, and a job has a
dozen of them. So `Metrics` adds up by itself, in well under a microsecond each. Counters and
gauges are handed over when OpenTelemetry's reader asks; it cannot ask for histograms, which
Prometheus' registry reads beside it.
"""

import asyncio
import logging
import os
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import accumulate
from typing import Literal

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import CallbackOptions, Meter, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from headrace_shared import telemetry
from headrace_shared import telemetry_names as names
from headrace_shared.budgets import BudgetView
from headrace_shared.ids import Lane, Tenant, WorkerId
from headrace_shared.job import ClaimedJob
from headrace_shared.logs import Occasional, OccasionalFilter
from headrace_shared.money import NANO_PER_USD, ZERO, NanoUSD
from headrace_shared.outcome import ErrorClass, Outcome, Retry, Snoozed
from headrace_shared.request import Endpoint
from headrace_shared.routes import Target
from headrace_shared.settings import Settings
from headrace_shared.store.pauses import Pause
from headrace_shared.telemetry_names import Instrument
from headrace_shared.usage import Usage

MAX_SERIES = 1900
"""Of one metric; what comes after them is counted together, under the label value `other`. From 2,000 on
OpenTelemetry would do so itself, under a label of its own that every series then has."""

FLUSH_SECONDS = 2.0
"""How long a shutdown waits for a collector to take the last spans."""

LAG_INTERVAL = 0.25

BreakerState = Literal["closed", "half_open", "open"]

_occasionally = Occasional(logging.getLogger(__name__))
_outage_filter = OccasionalFilter()

_BREAKER_STATES: dict[BreakerState, int] = {"closed": 0, "half_open": 1, "open": 2}


class _Distribution:
    __slots__ = ("counts", "total")

    def __init__(self, buckets: int) -> None:
        self.counts = [0] * (buckets + 1)
        self.total = 0.0


class _Sums:
    """The series of each metric by its name, added up; written by one thread, read by any."""

    def __init__(self) -> None:
        self._numbers: dict[str, dict[tuple[str, ...], float]] = {}
        self._distributions: dict[str, tuple[Instrument, dict[tuple[str, ...], _Distribution]]] = {}

    def add(self, instrument: Instrument, labels: tuple[str, ...], amount: float = 1) -> None:
        series = self._numbers.setdefault(instrument.name, {})
        key = _bounded(series, labels)
        series[key] = series.get(key, 0) + amount

    def set(self, instrument: Instrument, labels: tuple[str, ...], value: float) -> None:
        series = self._numbers.setdefault(instrument.name, {})
        series[_bounded(series, labels)] = value

    def replace(self, instrument: Instrument, series: dict[tuple[str, ...], float]) -> None:
        self._numbers[instrument.name] = series

    def observe(self, instrument: Instrument, labels: tuple[str, ...], value: float) -> None:
        _, series = self._distributions.setdefault(instrument.name, (instrument, {}))
        key = _bounded(series, labels)
        found = series.get(key)
        if found is None:
            found = series[key] = _Distribution(len(instrument.buckets))
        found.counts[bisect_left(instrument.buckets, value)] += 1
        found.total += value

    def numbers(self, instrument: Instrument) -> list[Observation]:
        series = list(self._numbers.get(instrument.name, {}).items())
        return [
            Observation(value, dict(zip(instrument.labels, labels, strict=True))) for labels, value in series
        ]

    def histograms(self) -> list[HistogramMetricFamily]:
        found = list(self._distributions.values())
        return [_histogram(instrument, list(series.items())) for instrument, series in found]


def _bounded(
    series: dict[tuple[str, ...], float] | dict[tuple[str, ...], _Distribution], labels: tuple[str, ...]
) -> tuple[str, ...]:
    if labels in series or len(series) < MAX_SERIES:
        return labels
    return ("other",) * len(labels)


def _histogram(
    of: Instrument, series: Iterable[tuple[tuple[str, ...], _Distribution]]
) -> HistogramMetricFamily:
    unit = "_seconds" if of.unit == "s" else ""
    labels = [name.replace(".", "_") for name in of.labels]
    family = HistogramMetricFamily(of.name.replace(".", "_") + unit, of.description, labels=labels)
    bounds = [*(f"{bound:g}" for bound in of.buckets), "+Inf"]
    for values, found in series:
        family.add_metric(values, list(zip(bounds, accumulate(found.counts), strict=True)), found.total)
    return family


class Metrics(Collector):
    """What the worker counts.

    Args:
        enabled: False where nobody reads them: then nothing is counted.
        tenants: True tells tenants apart, in the metrics of jobs, costs and budgets; without
            it the budgets of tenants are not shown. Of each metric there are `MAX_SERIES` all the same.

    """

    def __init__(self, *, enabled: bool = True, tenants: bool = False) -> None:
        self._on = enabled
        self._tenants = tenants
        self._sums = _Sums()
        self._names = names.gen_ai_names()
        self._watched: list[Callable[[], None]] = []

    def watch(self, read: Callable[[], None]) -> None:
        """Call this before each reading, to set gauges; from another thread, so it only looks."""
        self._watched.append(read)

    def run_ended(
        self, job: ClaimedJob, outcome: Outcome, *, ran: timedelta, age: timedelta | None = None
    ) -> None:
        """Count the end of a run; `age` is the job's since it was created, if the job ended with it."""
        if not self._on:
            return
        lane = job.queue.lane
        name, reason = telemetry.describe(outcome)
        self._sums.observe(names.WAIT, (lane,), job.waited.total_seconds())
        self._sums.observe(names.RUN_DURATION, (lane, name), ran.total_seconds())
        match outcome:
            case Retry():
                self._sums.add(names.RETRIES, (reason,))
            case Snoozed():
                self._sums.add(names.SNOOZES, (reason,))
            case _:
                self._sums.add(names.JOBS, (lane, name, reason, self._tenant(job.queue.tenant)))
                if age is not None:
                    self._sums.observe(names.JOB_DURATION, (lane, name), age.total_seconds())

    def retried(self, error_class: ErrorClass) -> None:
        """Count a call that is made again in the same run."""
        self._count(names.RETRIES, 1, error_class)

    def call_ended(
        self,
        target: Target,
        endpoint: Endpoint,
        *,
        latency: timedelta,
        usage: Usage | None = None,
        error_class: ErrorClass | None = None,
    ) -> None:
        """Count a provider call, whatever it came to."""
        if not self._on:
            return
        labels = (names.OPERATIONS[endpoint], target.provider, target.model)
        self._sums.observe(self._names.call_duration, (*labels, error_class or ""), latency.total_seconds())
        if usage is not None and (histogram := self._names.token_histogram):
            self._sums.observe(histogram, (*labels, "input"), usage.prompt_tokens)
            self._sums.observe(histogram, (*labels, "output"), usage.completion_tokens)
        if self._names.token_counters:
            self._count_tokens((*labels, "unknown"), usage)

    def spent(self, target: Target, tenant: Tenant, cost: NanoUSD, suspense: NanoUSD = ZERO) -> None:
        """Count what a call cost, and what of it is in suspense."""
        if not self._on:
            return
        labels = (target.provider, target.model, self._tenant(tenant))
        self._sums.add(names.COST, labels, cost / NANO_PER_USD)
        if suspense:
            self._sums.add(names.SUSPENSE, labels, suspense / NANO_PER_USD)

    def leases_lost(self, count: int = 1) -> None:
        self._count(names.LEASES_LOST, count)

    def fenced_writes(self, count: int = 1) -> None:
        self._count(names.FENCED_WRITES, count)

    def loop_stalled(self) -> None:
        self._count(names.LOOP_STALLS, 1)

    def foreign_dropped(self, count: int = 1) -> None:
        self._count(names.FOREIGN_DROPPED, count)

    def duplicates_dropped(self, count: int = 1) -> None:
        self._count(names.DUPLICATES_DROPPED, count)

    def callback_ended(self, outcome: str, duration: timedelta) -> None:
        """Count an attempt at a callback: ``delivered``, ``gone``, or why it failed."""
        if self._on:
            self._sums.add(names.CALLBACKS, (outcome,))
            self._sums.observe(names.CALLBACK_DURATION, (outcome,), duration.total_seconds())

    def running(self, jobs: int) -> None:
        self._gauge(names.RUNNING, jobs)

    def pool_in_use(self, connections: int) -> None:
        self._gauge(names.POOL_IN_USE, connections)

    def server_up(self, server: Literal["postgres", "redis"], *, up: bool) -> None:
        self._gauge(names.SERVER_UP, int(up), server)

    def breaker(self, target: Target, state: BreakerState) -> None:
        self._gauge(names.BREAKER_STATE, _BREAKER_STATES[state], target.provider, target.model)

    def waiting(self, lane: Lane, jobs: int, oldest: timedelta) -> None:
        """Set how many jobs of a lane wait, and for how long the oldest has been due."""
        self._gauge(names.DEPTH, jobs, lane)
        self._gauge(names.OLDEST_AGE, oldest.total_seconds(), lane)

    def budgets(self, views: Iterable[BudgetView]) -> None:
        """Set what all budgets are at; those that are not named are gone."""
        shown = [view for view in views if self._tenants or not view.state.scope.startswith("tenant:")]
        self._budget(names.BUDGET_LIMIT, shown, lambda view: view.state.limit)
        self._budget(names.BUDGET_SETTLED, shown, lambda view: view.state.settled)
        self._budget(names.BUDGET_SUSPENSE, shown, lambda view: view.state.suspense)
        self._budget(names.BUDGET_HELD, shown, lambda view: view.held)

    def paused(self, pauses: Iterable[Pause]) -> None:
        """Set what is paused; tenants are counted under one name unless they are told apart."""
        shown = Counter(
            "tenant" if one.scope.startswith("tenant:") and not self._tenants else one.scope for one in pauses
        )
        if self._on:
            self._sums.replace(names.PAUSED, {(scope,): n for scope, n in shown.most_common(MAX_SERIES)})

    def budget_alert(self, scope: str, window: str, level: str) -> None:
        """Count an alert; budgets of tenants are counted together unless tenants are told apart."""
        kind, _, name = scope.partition(":")
        self._count(names.BUDGET_ALERTS, 1, scope if self._tenants or not name else kind, window, level)

    async def watch_event_loop(self) -> None:
        """Measure for ever how late the event loop is."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LAG_INTERVAL
            await asyncio.sleep(LAG_INTERVAL)
            if self._on:
                self._sums.observe(names.LOOP_LAG, (), max(0.0, loop.time() - due))

    def publish(self, meter: Meter) -> None:
        """Offer counters and gauges to OpenTelemetry."""
        for instrument in (*names.INSTRUMENTS, *self._names.token_counters.values()):
            look = [partial(self._look, instrument)]
            if instrument.kind == "counter":
                meter.create_observable_counter(
                    instrument.name, look, instrument.unit, instrument.description
                )
            elif instrument.kind == "gauge":
                meter.create_observable_gauge(instrument.name, look, instrument.unit, instrument.description)

    def collect(self) -> list[HistogramMetricFamily]:
        """Return the histograms, after looking at what is watched."""
        for look in self._watched:
            try:
                look()
            except Exception as error:  # noqa: BLE001 - one gauge that cannot be read costs no other
                _occasionally.warning("a gauge cannot be read: %r", error)
        return self._sums.histograms()

    def _look(self, instrument: Instrument, _: CallbackOptions) -> list[Observation]:
        return self._sums.numbers(instrument)

    def _count(self, instrument: Instrument, amount: float, *labels: str) -> None:
        if self._on and amount:
            self._sums.add(instrument, labels, amount)

    def _gauge(self, instrument: Instrument, value: float, *labels: str) -> None:
        if self._on:
            self._sums.set(instrument, labels, value)

    def _count_tokens(self, labels: tuple[str, ...], usage: Usage | None) -> None:
        counts = (
            (0, 0, 0, 0, 0)
            if usage is None
            else (
                usage.prompt_tokens,
                usage.completion_tokens,
                usage.cached_tokens,
                usage.cache_write_tokens,
                usage.reasoning_tokens,
            )
        )
        for kind, count in zip(names.TOKEN_KINDS, counts, strict=True):
            self._sums.add(self._names.token_counters[kind], labels, count)

    def _budget(
        self, instrument: Instrument, views: Sequence[BudgetView], amount: Callable[[BudgetView], NanoUSD]
    ) -> None:
        if self._on:
            series = {(view.state.scope, str(view.state.kind)): amount(view) / NANO_PER_USD for view in views}
            self._sums.replace(instrument, dict(list(series.items())[:MAX_SERIES]))

    def _tenant(self, tenant: Tenant) -> str:
        return tenant if self._tenants else ""


@dataclass(frozen=True, slots=True)
class Telemetry:
    """What `setup` made, until it is shut down."""

    metrics: Metrics
    registry: CollectorRegistry | None
    """What `/metrics` shows; None when no metrics port is set."""
    spans: BatchSpanProcessor | None
    """Sends spans to a collector; None when none is named, or the process has its own way."""

    async def shutdown(self) -> None:
        """Send what is left, for at most `FLUSH_SECONDS`; a second time does nothing."""
        if self.spans is None:
            return
        telemetry.install(None)
        done, loop = asyncio.Event(), asyncio.get_running_loop()
        # Not an executor's thread: the interpreter would wait for one that hangs on a collector.
        threading.Thread(target=_shut_down, args=(self.spans, loop, done), daemon=True).start()
        with suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_SECONDS):
                await done.wait()


def setup(settings: Settings, worker_id: WorkerId) -> Telemetry:
    """Set up what the environment asks for: `OTEL_EXPORTER_OTLP_ENDPOINT`, `HEADRACE_METRICS_PORT`.

    `HEADRACE_METRICS_TENANTS` tells tenants apart in metrics.

    A process that has a tracer provider of its own keeps it, and Headrace's spans go there.
    """
    resource = _resource(worker_id)
    metrics = Metrics(enabled=settings.metrics_port is not None, tenants=settings.metrics_tenants)
    registry = None
    if settings.metrics_port is not None:
        registry = _publish(metrics, resource)
    spans = BatchSpanProcessor(OTLPSpanExporter()) if _wants_spans() else None
    if spans is not None:
        logging.getLogger(OTLPSpanExporter.__module__).addFilter(_outage_filter)
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(spans)
        telemetry.install(provider)
    return Telemetry(metrics, registry, spans)


def _publish(metrics: Metrics, resource: Resource) -> CollectorRegistry:
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    # Before the reader: the registry asks in this order, and asking for the histograms sets gauges.
    registry.register(metrics)
    reader = PrometheusMetricReader(scope_info_enabled=False, registry=registry)
    provider = MeterProvider([reader], resource, shutdown_on_exit=False)
    metrics.publish(provider.get_meter(names.SCOPE))
    return registry


def _wants_spans() -> bool:
    environment = os.environ
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    if environment.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp":
        return False
    if not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return False
    return bool(
        environment.get("OTEL_EXPORTER_OTLP_ENDPOINT")
        or environment.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    )


def _resource(worker_id: WorkerId) -> Resource:
    found = Resource.create({SERVICE_INSTANCE_ID: worker_id})
    if str(found.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
        return found.merge(Resource({SERVICE_NAME: "headrace-worker"}))
    return found


def _shut_down(spans: BatchSpanProcessor, loop: asyncio.AbstractEventLoop, done: asyncio.Event) -> None:
    processor: SpanProcessor = spans
    processor.shutdown()
    with suppress(RuntimeError):  # the loop may be closed by now
        loop.call_soon_threadsafe(done.set)
