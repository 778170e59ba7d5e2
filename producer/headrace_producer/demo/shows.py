"""The three ways in which the demo can be answered: simulated, by OpenAI, by a small local model."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from headrace_producer.demo import local_model
from headrace_producer.demo.answering import Answering
from headrace_producer.demo.screen import Screen
from headrace_producer.demo.stage import Plan
from headrace_producer.demo.tasks import CHAT, MODELS, TENANTS, Task, tasks
from headrace_shared.errors import InvalidConfiguration
from headrace_shared.testing.behaviour import Behaviour
from headrace_shared.testing.simulated_provider import SimulatedProvider

MANY = 1000
FEW = 8
_ENOUGH = 40

TOML = """
[retries]
initial = "500ms"
maximum = "4s"

[breaker]               # a breaker for each model: quick to open and quick to try again
failure_rate = 0.5
minimum_calls = 4
window = "1s"
cooldown = "2s"
probe_lease = "5s"

[webhooks]
timeout = "2s"
schedule = ["0s", "1s", "5s", "30s"]
"""

_LOCAL_TOML = """
[defaults]
provider = "local"
max_output_tokens = 16

[providers.local]
base_url = "{url}"
api_key = "none"
read_timeout = "10m"
total_timeout = "10m"

[prices."local/{model}"]  # it runs on this machine
input = 0
output = 0

[webhooks]
timeout = "5s"
"""

_BEHAVIOUR = Behaviour(latency=timedelta(milliseconds=275), jitter=0.45)
_DIRECT = {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
_LEASE_SECONDS = 4.0
_LOCAL_LEASE_SECONDS = 30.0

_BEGINNINGS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "The three primary colours are",
    "A mill is driven by a wheel that",
    "The largest planet of the solar system is",
    "Bread is made of flour, water, salt and",
    "The opposite of hot is",
    "In the year 1969, the first man walked on",
)


@dataclass(frozen=True, slots=True)
class Show:
    """One performance: the work, who answers it, and what is done to it meanwhile."""

    provider: str
    """Its name in the configuration."""
    models: tuple[str, ...]
    plan: Plan
    work: Sequence[Task]
    simulated: SimulatedProvider | None = None
    crash: bool = True
    answers_shown: int = 1


@asynccontextmanager
async def open_show(
    answering: Answering, jobs: int | None, directory: Path, screen: Screen
) -> AsyncGenerator[Show]:
    """Prepare a performance, and start whoever answers when that is one of the demo's own."""
    match answering:
        case Answering.SIMULATED:
            async with SimulatedProvider(_BEHAVIOUR, record=True) as provider:
                screen.event("SIMULATED answers: no model is called and nothing is paid", "bold")
                environment = {"OPENAI_API_KEY": "sk-simulated", "OPENAI_BASE_URL": provider.url, **_DIRECT}
                yield _many(jobs or MANY, environment, provider)
        case Answering.OPENAI:
            screen.event("REAL answers: the provider is paid; no outage is caused with a real one", "bold")
            yield _many(jobs or MANY, {}, None)
        case Answering.LOCAL:
            async with local_model.serve(directory) as url:
                screen.event(f"{local_model.NAME} answers on this machine, at {url}", "bold")
                yield _few(jobs or FEW, url)


def _many(jobs: int, environment: Mapping[str, str], simulated: SimulatedProvider | None) -> Show:
    if jobs < _ENOUGH:
        raise InvalidConfiguration(
            where="--jobs", reason=f"must be at least {_ENOUGH}, to outlast the outage"
        )
    slots = max(3, min(12, jobs // 12))
    plan = Plan(TOML, TENANTS, 2, slots, _LEASE_SECONDS, environment)
    return Show("openai", MODELS, plan, tasks(jobs), simulated)


def _few(jobs: int, url: str) -> Show:
    toml = _LOCAL_TOML.format(url=url, model=local_model.NAME)
    work = [_beginning(number) for number in range(jobs)]
    plan = Plan(toml, TENANTS[:1], 1, 2, _LOCAL_LEASE_SECONDS, _DIRECT)
    return Show("local", (local_model.NAME,), plan, work, crash=False, answers_shown=jobs)


def _beginning(number: int) -> Task:
    prompt = _BEGINNINGS[number % len(_BEGINNINGS)]
    message = {"role": "user", "content": prompt}
    body = {"model": local_model.NAME, "messages": [message], "max_tokens": 16, "temperature": 0}
    return Task(CHAT, body, TENANTS[0], "default", "continue", prompt)
