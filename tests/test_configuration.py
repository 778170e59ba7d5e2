import json
import re
from collections.abc import Iterator
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import cast

import pytest

from headrace_shared.configuration import Configuration, parse_toml
from headrace_shared.configuration_sections import Section
from headrace_shared.errors import InvalidConfiguration, InvalidRequest, MissingSetting
from headrace_shared.ids import Tenant
from headrace_shared.jsonvalue import is_table
from headrace_shared.policy import Terms
from headrace_shared.routes import Route, Target
from headrace_shared.secrets import SecretReference

EXAMPLE = Path(__file__).parent.parent / "examples" / "headrace.toml"
FULL = """
[providers.groq]
base_url = "https://api.groq.com/openai/v1/"
api_key = "file:/run/secrets/groq"
read_timeout = "2m"
headers = { X-Team = "search", Authorization-Extra = "env:EXTRA" }

[routes.fast]
targets = [
  { provider = "groq", model = "llama/8b", weight = 3 },
  { provider = "openai", model = "gpt-4o-mini" },
]

[prices."groq/llama/8b"]
input = 0.05
cached_input = "0.0255"
output = "0.08"

[limits."openai/gpt-4o-mini"]
requests_per_minute = 500
tokens_per_minute = 200000
concurrent = 50

[lanes]
urgent = 16
batch = 2

[tenants.acme]
weight = 3

[tenants."Big_Co.2"]
concurrent = 20

[keys."Nightly.CI"]
concurrent = 2

[retries]
initial = "500ms"
maximum = 30

[breaker]
failure_rate = 0.25

[webhooks]
schedule = ["0s", "5s", "2h"]
previous_secret = "env:OLD"

[defaults]
any_model = false
lane = "urgent"
"""


def test_no_file_at_all_is_a_configuration() -> None:
    configuration = Configuration.default()
    assert configuration.document() == {}
    assert configuration.resolve_route("anything").targets == (Target("openai", "anything"),)
    assert configuration.lane_weights() == {"interactive": 8, "default": 4, "batch": 1}
    assert configuration.webhook_policy().schedule[:3] == (
        timedelta(0),
        timedelta(seconds=5),
        timedelta(minutes=5),
    )
    assert len(configuration.webhook_policy().schedule) == 10
    assert configuration.retry_policy().max_attempts == 6
    assert configuration.breaker_policy().cooldown == timedelta(seconds=10)
    assert configuration.defaults.retention == timedelta(days=30)


def test_what_a_file_says_is_what_is_handed_out() -> None:
    configuration = parse_toml(FULL, "headrace.toml")
    groq = configuration.provider("groq")
    assert groq.base_url == "https://api.groq.com/openai/v1"
    assert groq.api_key == SecretReference("file:/run/secrets/groq")
    assert groq.priced_as == "groq"
    assert groq.timeouts.read == timedelta(minutes=2)
    assert configuration.prices["groq/llama/8b"].input == Decimal("0.05")
    assert configuration.limits["openai/gpt-4o-mini"].concurrent == 50
    assert configuration.lane_weights() == {"interactive": 8, "default": 4, "batch": 2, "urgent": 16}
    caps = {Tenant("Big_Co.2"): 20}, {"Nightly.CI": 2}
    assert configuration.terms(7) == Terms(7, {Tenant("acme"): 3}, *caps)
    assert configuration.retry_policy().initial == timedelta(milliseconds=500)
    assert configuration.retry_policy().maximum == timedelta(seconds=30)
    assert configuration.breaker_policy().failure_rate == 0.25
    assert configuration.webhook_policy().previous_secret == SecretReference("env:OLD")


def test_a_document_survives_json_and_equal_configurations_share_a_hash() -> None:
    configuration = parse_toml(FULL, "headrace.toml")
    again = Configuration.from_document(json.loads(json.dumps(configuration.document())))
    assert again == configuration
    assert hash(again) == hash(configuration)
    assert again.document() == configuration.document()
    assert configuration != Configuration.default()


def test_a_route_keeps_its_order_and_weights() -> None:
    configuration = parse_toml(FULL, "headrace.toml")
    route = configuration.resolve_route("fast")
    assert [str(target) for target in route.targets] == ["groq/llama/8b", "openai/gpt-4o-mini"]
    assert route.weights == (3, 1)
    assert configuration.resolve_route("fast") is route
    assert isinstance(route, Route)


def test_an_unknown_model_is_refused_when_only_routes_count() -> None:
    configuration = parse_toml(FULL, "headrace.toml")
    with pytest.raises(InvalidRequest, match=r"model: there is no route 'fats' \(did you mean fast\?\)"):
        configuration.resolve_route("fats")


def test_the_default_provider_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert Configuration.default().provider("openai").base_url == "https://api.openai.com/v1"
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1/")
    provider = Configuration.default().provider("openai")
    assert provider.base_url == "http://127.0.0.1:9/v1"
    assert provider.priced_as == "openai"
    assert provider.api_key == SecretReference("env:OPENAI_API_KEY")


def test_another_provider_never_gets_the_key_of_openai() -> None:
    configuration = parse_toml('[providers.my-gpu]\nbase_url = "http://gpu:8000/v1"', "headrace.toml")
    assert configuration.provider("my-gpu").api_key == SecretReference("env:MY_GPU_API_KEY")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[providers.openai]\nbase_urll = "x"',
            r"providers\.openai\.base_urll: unknown key \(did you mean base_url",
        ),
        ("[tenants.acme]\nconcurrent = 0", r"tenants\.acme\.concurrent: must be"),
        ('[tenants."a b"]', r"tenants\..*: must be 1 to 64 letters"),
        ("[keys.ci]", r"keys\.ci\.concurrent: is missing"),
        ("[keys.ci]\nconcurrent = 0", r"keys\.ci\.concurrent: must be"),
        ("[keys.ci]\nconcurent = 1", r"keys\.ci\.concurent: unknown key \(did you mean concurrent"),
        ('[keys."a/b"]\nconcurrent = 1', r"keys\..*: must be 1 to 64 letters"),
        ("[provider.openai]", r"provider: unknown key \(did you mean providers"),
        (
            '[routes.a]\ntargets = [{ provider = "openai", modle = "m" }]',
            r"routes\.a\.targets\[0\]\.modle: unknown",
        ),
        (
            '[routes.a]\ntargets = [{ provider = "x", model = "m" }]',
            r"targets\[0\]\.provider: there is no provider",
        ),
        ("[routes.a]\ntargets = []", r"routes\.a\.targets: must have at least one"),
        ('[retries]\nmax_attempts = "6"', r"retries\.max_attempts: must be a whole number, not a string"),
        ("[retries]\nmax_attempts = 0", r"retries\.max_attempts: must be greater"),
        ('[retries]\ninitial = "2m"', r"retries\.initial: must not be longer"),
        (
            '[prices."openai/m"]\ninput = -1\noutput = 1',
            r'prices\."openai/m"\.input: must be an amount of dollars',
        ),
        ('[prices."openai/m"]\ninput = 1', r'prices\."openai/m"\.output: is missing'),
        (
            '[prices."openai/m"]\noutput = 1\ncontext = 1',
            r'prices\."openai/m"\.output: needs input beside it',
        ),
        ('[prices."gpt"]\ninput = 1\noutput = 1', r"prices\.gpt: must be named provider/model"),
        ('[prices."groq/m"]\ninput = 1\noutput = 1', r'prices\."groq/m": there is no provider'),
        ('[providers.groq]\npriced_as = "groq"', r"providers\.groq\.base_url: is missing"),
        ('[defaults]\nlane = "nowhere"', r"defaults\.lane: there is no such lane"),
        ('[defaults]\nprovider = "nowhere"', r"defaults\.provider: there is no provider"),
        ("[breaker]\nfailure_rate = 1.5", r"breaker\.failure_rate: must be a number above 0 and up to 1"),
        ('[webhooks]\ntimeout = "soon"', r"webhooks\.timeout: must be a duration"),
        ("[defaults]\n\nlane = ", r"^headrace\.toml, (line \d+|last line): is not TOML"),
        ("[defaults]\nlane = @\n[x]\n", r"^headrace\.toml, line 2: is not TOML"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(text: str, message: str) -> None:
    with pytest.raises(InvalidConfiguration, match=message):
        parse_toml(text, "headrace.toml")


@pytest.mark.parametrize(
    "text",
    [
        '[providers.openai]\napi_key = "sk-very-secret"',
        '[webhooks]\nsecret = "sk-very-secret"',
        '[providers.openai]\nheaders = { Authorization = "sk-very-secret" }',
        '[providers.openai]\nbase_url = "https://user:sk-very-secret@example.com"',
    ],
)
def test_a_literal_secret_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(InvalidConfiguration) as refused:
        parse_toml(text, "headrace.toml")
    assert "sk-very-secret" not in str(refused.value)
    assert refused.value.__cause__ is None


def test_a_secret_is_read_and_masked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-1")
    secret = SecretReference("env:SOME_KEY").resolve()
    assert secret.reveal() == "sk-1"
    assert "sk-1" not in f"{secret} {secret!r}"
    (tmp_path / "key").write_text("sk-2\n")
    assert SecretReference(f"file:{tmp_path / 'key'}").resolve().reveal() == "sk-2"


def test_a_missing_secret_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(MissingSetting, match="SOME_KEY is not set"):
        SecretReference("env:SOME_KEY").resolve()
    with pytest.raises(MissingSetting, match="No such file"):
        SecretReference(f"file:{tmp_path / 'nothing'}").resolve()


def test_the_example_says_what_holds_without_it() -> None:
    example, default = (
        parse_toml(EXAMPLE.read_text(encoding="utf-8"), "headrace.toml"),
        Configuration.default(),
    )
    for section in ("lanes", "retries", "breaker", "webhooks", "defaults"):
        assert getattr(example, section) == getattr(default, section)


def sections(of: object) -> Iterator[Section]:
    """Every section in a value, itself first."""
    if isinstance(of, Section):
        yield of
        for _, value in of:
            yield from sections(value)
    elif isinstance(of, tuple):
        for value in cast("tuple[object, ...]", of):
            yield from sections(value)
    elif is_table(of):
        for value in of.values():
            yield from sections(value)


def kinds() -> Iterator[type[Section]]:
    waiting = [Section]
    while waiting:
        yield (kind := waiting.pop())
        waiting += kind.__subclasses__()


def test_the_example_has_every_key() -> None:
    # A line of its own that begins with "# key = " is of a key that has no value to show by default.
    text = re.sub(r"(?m)^# (?=\w+ = )", "", EXAMPLE.read_text(encoding="utf-8"))
    said = list(sections(parse_toml(text, "headrace.toml")))
    for kind in kinds():
        named = {key for section in said if isinstance(section, kind) for key in section.model_fields_set}
        inherited = {
            key for above in kind.__bases__ if issubclass(above, Section) for key in above.model_fields
        }
        assert kind.model_fields.keys() - inherited <= named, kind.__name__
