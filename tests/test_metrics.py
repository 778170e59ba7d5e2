"""What a worker counts, as Prometheus reads it."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from prometheus_client import generate_latest

from headrace_shared.budgets import BudgetView
from headrace_shared.ids import Lane, Tenant, WorkerId
from headrace_shared.job import ClaimedJob
from headrace_shared.money import NanoUSD
from headrace_shared.outcome import ErrorClass, Snoozed, Succeeded, WaitReason
from headrace_shared.request import Endpoint
from headrace_shared.routes import Target
from headrace_shared.settings import Settings
from headrace_shared.store.money import BudgetPolicy, BudgetState, WindowKind
from headrace_shared.store.pauses import Pause
from headrace_shared.testing.jobs import claimed_job
from headrace_shared.usage import Usage
from headrace_workers.telemetry import MAX_SERIES, setup

TARGET = Target("openai", "gpt-4o-mini")
USAGE = Usage(100, 40, 20, 5, 3)
LATEST_OPT_IN = "messaging,gen_ai_latest_experimental"


def claimed(waited: timedelta = timedelta(0)) -> ClaimedJob:
    return replace(claimed_job(lane=Lane("batch")), waited=waited)


def budget(scope: str, held: int) -> BudgetView:
    state = BudgetState(
        scope, WindowKind.DAY, "2026-11-21", NanoUSD(5_000_000_000), BudgetPolicy.WAIT, NanoUSD(0), NanoUSD(0)
    )
    return BudgetView(state, NanoUSD(held))


def pause(scope: str) -> Pause:
    return Pause(scope, datetime.now(UTC), None, None)


def exposition(monkeypatch: pytest.MonkeyPatch, opt_in: str = "", *, tenants: bool = False) -> str:
    monkeypatch.setenv("OTEL_SEMCONV_STABILITY_OPT_IN", opt_in)
    if tenants:
        monkeypatch.setenv("HEADRACE_METRICS_TENANTS", "true")
    made = setup(Settings(metrics_port=0), WorkerId("w1"))
    metrics, second = made.metrics, timedelta(seconds=1)
    metrics.run_ended(claimed(second), Succeeded(), ran=2 * second, age=timedelta(minutes=50))
    metrics.run_ended(claimed(), Snoozed(second, WaitReason.BUDGET), ran=second)
    metrics.call_ended(TARGET, Endpoint.CHAT_COMPLETIONS, latency=second, usage=USAGE)
    metrics.call_ended(TARGET, Endpoint.CHAT_COMPLETIONS, latency=second, error_class=ErrorClass.TIMEOUT)
    metrics.spent(TARGET, Tenant("acme"), NanoUSD(2_500_000_000))
    metrics.budgets([budget("global", 500_000_000), budget("tenant:acme", 1)])
    metrics.paused([pause("lane:batch"), pause("tenant:acme"), pause("tenant:other")])
    metrics.breaker(TARGET, "open")
    metrics.watch(lambda: metrics.running(7))
    assert made.registry is not None
    return generate_latest(made.registry).decode()


def test_metrics_reach_prometheus(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = exposition(monkeypatch).splitlines()
    assert 'headrace_jobs_total{error_class="",lane="batch",outcome="succeeded",tenant=""} 1.0' in lines
    assert 'headrace_snoozes_total{reason="budget"} 1.0' in lines
    assert 'headrace_queue_wait_seconds_bucket{lane="batch",le="1"} 2.0' in lines
    assert 'headrace_queue_wait_seconds_bucket{lane="batch",le="0.5"} 1.0' in lines
    assert 'headrace_job_duration_seconds_bucket{lane="batch",le="1800",outcome="succeeded"} 0.0' in lines
    assert 'headrace_job_duration_seconds_bucket{lane="batch",le="3600",outcome="succeeded"} 1.0' in lines
    assert 'headrace_cost_total{model="gpt-4o-mini",provider="openai",tenant=""} 2.5' in lines
    assert "headrace_running 7.0" in lines
    assert 'headrace_breaker_state{model="gpt-4o-mini",provider="openai"} 2.0' in lines
    assert 'headrace_budget_held{scope="global",window="day"} 0.5' in lines
    assert 'headrace_paused{scope="lane:batch"} 1.0' in lines
    assert 'headrace_paused{scope="tenant"} 2.0' in lines
    call = 'gen_ai_operation_name="chat",gen_ai_provider_name="openai",gen_ai_request_model="gpt-4o-mini"'
    assert f'gen_ai_client_token_usage_sum{{{call},gen_ai_token_type="input"}} 100.0' in lines
    assert f'gen_ai_client_operation_duration_seconds_count{{error_type="timeout",{call}}} 1.0' in lines


def test_the_newest_names_of_metrics_reach_prometheus(monkeypatch: pytest.MonkeyPatch) -> None:
    page = exposition(monkeypatch, LATEST_OPT_IN)
    assert "gen_ai_client_inference_duration_seconds_bucket" in page
    assert 'gen_ai_token_modality="unknown"} 40.0' in page
    assert "gen_ai_client_inference_usage_cache_read_input_tokens_total" in page
    assert "gen_ai_client_token_usage" not in page


def test_tenants_are_told_apart_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "acme" not in exposition(monkeypatch)
    page = exposition(monkeypatch, tenants=True)
    assert 'tenant="acme"' in page
    assert 'headrace_budget_limit{scope="tenant:acme",window="day"} 5.0' in page
    assert 'headrace_paused{scope="tenant:other"} 1.0' in page


def test_however_many_tenants_there_are_the_number_of_series_is_bounded() -> None:
    made = setup(Settings(metrics_port=0, metrics_tenants=True), WorkerId("w1"))
    for number in range(2500):
        made.metrics.spent(TARGET, Tenant(f"tenant-{number}"), NanoUSD(1_000_000_000))
    made.metrics.budgets([budget(f"tenant:{number}", 1) for number in range(2500)])
    assert made.registry is not None
    lines = generate_latest(made.registry).decode().splitlines()
    assert sum(line.startswith("headrace_cost_total{") for line in lines) == MAX_SERIES + 1
    assert 'headrace_cost_total{model="other",provider="other",tenant="other"} 600.0' in lines
    assert sum(line.startswith("headrace_budget_limit{") for line in lines) == MAX_SERIES


def test_the_number_of_series_is_bounded() -> None:
    made = setup(Settings(metrics_port=0), WorkerId("w1"))
    for number in range(2500):
        target = Target("openai", f"model-{number}")
        made.metrics.spent(target, Tenant("acme"), NanoUSD(1_000_000_000))
        made.metrics.call_ended(target, Endpoint.EMBEDDINGS, latency=timedelta(seconds=1))
    assert made.registry is not None
    lines = generate_latest(made.registry).decode().splitlines()
    assert sum(float(line.split()[-1]) for line in lines if line.startswith("headrace_cost_total{")) == 2500
    assert sum(line.startswith("gen_ai_client_operation_duration_seconds_count") for line in lines) <= 2001


def test_nothing_is_counted_where_nobody_reads() -> None:
    made = setup(Settings(), WorkerId("w1"))
    made.metrics.run_ended(claimed(), Succeeded(), ran=timedelta(0))
    assert made.registry is None
    assert made.metrics.collect() == []
