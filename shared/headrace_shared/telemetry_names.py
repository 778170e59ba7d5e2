"""Every name that Headrace's telemetry uses, in one place: treat this table as interface.

Spans and the metrics of calls use the names of OpenTelemetry's conventions for generative
AI and for messaging; what these do not name stands under ``headrace.``. In Prometheus, dots
become underscores, a unit of seconds becomes ``_seconds`` and a counter ends in ``_total``.

The generative AI names are those of v1.41, which tools and dashboards know, unless
``OTEL_SEMCONV_STABILITY_OPT_IN`` contains ``gen_ai_latest_experimental``.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from headrace_shared.request import Endpoint

SCOPE = "headrace"

# Attributes of spans: messaging
MESSAGING_SYSTEM = "messaging.system"
MESSAGING_OPERATION_TYPE = "messaging.operation.type"
MESSAGING_OPERATION_NAME = "messaging.operation.name"
MESSAGING_DESTINATION = "messaging.destination.name"
MESSAGING_MESSAGE_ID = "messaging.message.id"
MESSAGING_BATCH_COUNT = "messaging.batch.message_count"

# Attributes of spans: calls
GEN_AI_OPERATION = "gen_ai.operation.name"
GEN_AI_PROVIDER = "gen_ai.provider.name"
GEN_AI_REQUEST_MODEL = "gen_ai.request.model"
GEN_AI_RESPONSE_ID = "gen_ai.response.id"
GEN_AI_RESPONSE_MODEL = "gen_ai.response.model"
GEN_AI_FINISH_REASONS = "gen_ai.response.finish_reasons"
GEN_AI_INPUT_TOKENS = "gen_ai.usage.input_tokens"
GEN_AI_OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
GEN_AI_CACHE_READ_TOKENS = "gen_ai.usage.cache_read.input_tokens"
GEN_AI_REASONING_TOKENS = "gen_ai.usage.reasoning.output_tokens"
GEN_AI_TYPE_OF_TOKENS = "gen_ai.token.type"
GEN_AI_MODALITY_OF_TOKENS = "gen_ai.token.modality"

# Attributes of spans: any
ERROR_TYPE = "error.type"
SERVER_ADDRESS = "server.address"
SERVER_PORT = "server.port"
HTTP_METHOD = "http.request.method"
HTTP_STATUS = "http.response.status_code"
HTTP_RESEND_COUNT = "http.request.resend_count"

# Attributes of spans: Headrace's own
ATTEMPTS = "headrace.attempts"
CALL_COST = "headrace.cost_nano_usd"
DELIVERY_ID = "headrace.delivery.id"
OUTCOME = "headrace.outcome"
QUEUE_WAIT = "headrace.queue_wait"
REQUEST_ID = "headrace.provider.request_id"
ROUTE = "headrace.route"
RUN = "headrace.run"
TENANT = "headrace.tenant"

OPERATIONS: Mapping[Endpoint, str] = {
    Endpoint.CHAT_COMPLETIONS: "chat",
    Endpoint.RESPONSES: "chat",
    Endpoint.EMBEDDINGS: "embeddings",
    Endpoint.MODERATIONS: "moderations",
}
"""The `gen_ai.operation.name` of an endpoint; no convention has one for moderations."""

TokenKind = Literal["input", "output", "cache_read", "cache_write", "reasoning"]
TOKEN_KINDS: tuple[TokenKind, ...] = get_args(TokenKind)


@dataclass(frozen=True, slots=True)
class Instrument:
    """One metric: a counter, a gauge, or, when it has buckets, a histogram."""

    kind: Literal["counter", "gauge", "histogram"]
    name: str
    unit: str
    description: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


SECONDS_OF_CALLS = tuple(0.01 * 2**step for step in range(14))
"""10 ms to 82 s, as the conventions advise."""
SECONDS_OF_JOBS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200, 1800, 3600)
TOKENS = tuple(float(4**step) for step in range(14))

_CALL = (GEN_AI_OPERATION, GEN_AI_PROVIDER, GEN_AI_REQUEST_MODEL)
_USAGE = "gen_ai.client.inference.usage"


@dataclass(frozen=True, slots=True)
class GenAINames:
    """The names that differ between the releases of the conventions."""

    cache_write_tokens: str
    """Attribute of a call's span."""
    call_duration: Instrument
    token_histogram: Instrument | None
    token_counters: Mapping[TokenKind, Instrument]


def _call_duration(name: str) -> Instrument:
    labels = (*_CALL, ERROR_TYPE)
    return Instrument("histogram", name, "s", "Duration of provider calls", labels, SECONDS_OF_CALLS)


def _token_counter(name: str) -> Instrument:
    return Instrument("counter", name, "{token}", "Tokens of calls", (*_CALL, GEN_AI_MODALITY_OF_TOKENS))


V1_41 = GenAINames(
    cache_write_tokens="gen_ai.usage.cache_creation.input_tokens",
    call_duration=_call_duration("gen_ai.client.operation.duration"),
    token_histogram=Instrument(
        "histogram",
        "gen_ai.client.token.usage",
        "{token}",
        "Tokens per call",
        (*_CALL, GEN_AI_TYPE_OF_TOKENS),
        TOKENS,
    ),
    token_counters={},
)

LATEST = GenAINames(
    cache_write_tokens="gen_ai.usage.cache_write.input_tokens",
    call_duration=_call_duration("gen_ai.client.inference.duration"),
    token_histogram=None,
    token_counters={
        "input": _token_counter(f"{_USAGE}.input_tokens"),
        "output": _token_counter(f"{_USAGE}.output_tokens"),
        "cache_read": _token_counter(f"{_USAGE}.cache_read.input_tokens"),
        "cache_write": _token_counter(f"{_USAGE}.cache_write.input_tokens"),
        "reasoning": _token_counter(f"{_USAGE}.reasoning.output_tokens"),
    },
)


def gen_ai_names(environment: Mapping[str, str] = os.environ) -> GenAINames:
    """Return the names that the environment asks for."""
    wanted = environment.get("OTEL_SEMCONV_STABILITY_OPT_IN", "").split(",")
    return LATEST if "gen_ai_latest_experimental" in (name.strip() for name in wanted) else V1_41


def _counter(name: str, description: str, *labels: str, unit: str = "") -> Instrument:
    return Instrument("counter", f"headrace.{name}", unit, description, labels)


def _gauge(name: str, description: str, *labels: str, unit: str = "") -> Instrument:
    return Instrument("gauge", f"headrace.{name}", unit, description, labels)


def _duration(name: str, description: str, *labels: str) -> Instrument:
    return Instrument("histogram", f"headrace.{name}", "s", description, labels, SECONDS_OF_JOBS)


# Jobs
JOBS = _counter("jobs", "Jobs that ended", "lane", "outcome", "error_class", "tenant")
RETRIES = _counter("retries", "Calls that failed and are made again", "error_class")
SNOOZES = _counter("snoozes", "Runs that were put back without a failure", "reason")
WAIT = _duration("queue_wait", "From when a job was due until its run began", "lane")
RUN_DURATION = _duration("run.duration", "From a run's beginning to its end", "lane", "outcome")
JOB_DURATION = _duration("job.duration", "From a job's creation to its ending", "lane", "outcome")
RUNNING = _gauge("running", "Jobs that run in this worker")
DEPTH = _gauge("queue_depth", "Jobs that wait", "lane")
OLDEST_AGE = _gauge("oldest_age", "How long the oldest due job has waited", "lane", unit="s")

# Recovery
LEASES_LOST = _counter("leases_lost", "Leases that this worker could not renew in time")
FENCED_WRITES = _counter("fenced_writes", "Results refused because another run owns the job")
FOREIGN_DROPPED = _counter("foreign_members_dropped", "Members of a queue that are no jobs of the store")
DUPLICATES_DROPPED = _counter("duplicate_dispatches_dropped", "Ids that were dispatched twice")

# Limits and money
BREAKER_STATE = _gauge("breaker_state", "0 closed, 1 half open, 2 open", "provider", "model")
COST = _counter("cost", "US dollars that calls cost", "provider", "model", "tenant", unit="{USD}")
SUSPENSE = _counter("suspense", "US dollars put in suspense", "provider", "model", "tenant", unit="{USD}")
PAUSED = _gauge("paused", "Scopes that an operator keeps back", "scope")
BUDGET_LIMIT = _gauge("budget_limit", "US dollars of the limit", "scope", "window", unit="{USD}")
BUDGET_SETTLED = _gauge("budget_settled", "US dollars that are spent", "scope", "window", unit="{USD}")
BUDGET_HELD = _gauge("budget_held", "US dollars held by open calls", "scope", "window", unit="{USD}")
BUDGET_SUSPENSE = _gauge("budget_suspense", "US dollars in suspense", "scope", "window", unit="{USD}")
BUDGET_ALERTS = _counter("budget_alerts", "Alerts about budgets", "scope", "window", "level")

# Callbacks
CALLBACKS = _counter("webhook_deliveries", "Attempts to deliver a callback", "outcome")
CALLBACK_DURATION = _duration("webhook_attempt.duration", "Duration of one attempt", "outcome")

# The process
LOOP_LAG = _duration("event_loop_lag", "How late the event loop wakes a sleeper")
LOOP_STALLS = _counter("event_loop_stalls", "Times that the event loop stood still for a third of a lease")
POOL_IN_USE = _gauge("db_pool_in_use", "Connections to PostgreSQL that are in use")
SERVER_UP = _gauge("server_up", "1 while the server answers", "server")

INSTRUMENTS = tuple(value for value in list(globals().values()) if isinstance(value, Instrument))
"""All of Headrace's own."""
