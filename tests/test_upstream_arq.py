"""What is overridden of arq is where it was: this fails when arq drifts, before anything else does."""

import inspect
import re
from importlib.metadata import version

import pytest
from arq import constants
from arq.connections import ArqRedis
from arq.worker import Worker as ArqWorker
from arq.worker import func

from headrace_shared.dispatch import keys
from headrace_workers.worker import Worker

SIGNATURES = {
    "_poll_iteration": ["self"],
    "close": ["self"],
    "finish_failed_job": ["self", "job_id", "result_data"],
    "handle_sig": ["self", "signum"],
    "handle_sig_wait_for_completion": ["self", "signum"],
    "heart_beat": ["self"],
    "main": ["self"],
    "record_health": ["self"],
    "run": ["self"],
    "run_cron": ["self", "n", "delay", "num_windows"],
    "run_job": ["self", "job_id", "score"],
    "start_jobs": ["self", "job_ids"],
    "_add_signal_handler": ["self", "signum", "handler"],
}
OPTIONS = {
    "burst", "functions", "handle_signals", "health_check_interval", "health_check_key",
    "job_completion_wait", "keep_result", "max_jobs", "max_tries", "on_startup", "queue_name",
    "redis_pool", "redis_settings",
}  # fmt: skip
PREFIXES = {
    "default_queue_name": "arq:queue",
    "health_check_key_suffix": ":health-check",
    "in_progress_key_prefix": "arq:in-progress:",
    "job_key_prefix": "arq:job:",
    "result_key_prefix": "arq:result:",
    "retry_key_prefix": "arq:retry:",
}


def test_the_version_is_the_one_that_was_read() -> None:
    assert version("arq").startswith("0.28.")


@pytest.mark.parametrize(("name", "parameters"), SIGNATURES.items())
def test_a_method_has_the_signature_that_was_read(name: str, parameters: list[str]) -> None:
    assert list(inspect.signature(getattr(ArqWorker, name)).parameters) == parameters


def test_what_is_overridden_exists_upstream_and_takes_the_same() -> None:
    own = {name for name, value in vars(Worker).items() if inspect.isfunction(value)}
    upstream = {name for name in own if hasattr(ArqWorker, name)} - {"__init__"}
    assert upstream == {"close", "handle_sig", "handle_sig_wait_for_completion", "main"}
    for name in upstream:
        theirs = inspect.signature(getattr(ArqWorker, name)).parameters
        assert list(inspect.signature(getattr(Worker, name)).parameters) == list(theirs)


def test_nothing_of_ours_shadows_an_attribute_of_theirs() -> None:
    """Our own names must not be taken by a later arq; those that are shared are meant."""
    code = inspect.getsource(ArqWorker.__init__)
    ours = re.findall(r"self\.(\w+) =|self\.(\w+): ", inspect.getsource(Worker.__init__))
    own = {first or second for first, second in ours}
    assert {"worker_id", "_draining"} <= own
    assert [name for name in own if f"self.{name} " in code or f"self.{name}:" in code] == []


def test_the_options_are_still_taken() -> None:
    assert set(inspect.signature(ArqWorker.__init__).parameters) >= OPTIONS
    assert {"coroutine", "name", "keep_result", "timeout"} <= set(inspect.signature(func).parameters)


@pytest.mark.parametrize(("name", "value"), PREFIXES.items())
def test_arqs_keys_are_not_ours(name: str, value: str) -> None:
    assert getattr(constants, name) == value
    ours = [key for key in vars(keys).values() if isinstance(key, str) and key.startswith("headrace")]
    assert ours
    assert not any(key.startswith(value) for key in ours)


def test_signals_still_come_through_the_two_handlers() -> None:
    code = inspect.getsource(ArqWorker.__init__)
    assert "self._add_signal_handler(signal.SIGTERM, self.handle_sig_wait_for_completion)" in code
    assert "self._add_signal_handler(signal.SIGTERM, self.handle_sig)" in code


def test_the_pool_closes_without_a_warning() -> None:
    assert "close_connection_pool" in inspect.signature(ArqRedis.aclose).parameters
