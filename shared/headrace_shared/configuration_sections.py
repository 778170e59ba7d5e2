"""The tables of ``headrace.toml``: each key with its default."""

from collections.abc import Mapping
from datetime import timedelta
from decimal import Decimal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from headrace_shared.configuration_errors import (
    UNKNOWN_KEY,
    unknown_key_reason,
)
from headrace_shared.configuration_fields import (
    BaseURL,
    Count,
    Dollars,
    Duration,
    EventURL,
    Flag,
    HeaderName,
    Headers,
    LongText,
    Name,
    PositiveDuration,
    Secret,
    Share,
    Text,
)
from headrace_shared.hosted_tools import HostedTool
from headrace_shared.ids import RouteName
from headrace_shared.jsonvalue import is_table
from headrace_shared.policy import (
    SuspenseRule,
    Timeouts,
)
from headrace_shared.routes import Fallback, Route, Strategy, Target, Trouble
from headrace_shared.secrets import SecretReference

DEFAULT_PROVIDER = "openai"


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _know_every_key(cls, given: object) -> object:
        for key in given if is_table(given) else ():
            if key not in cls.model_fields:
                reason = unknown_key_reason(key, cls.model_fields)
                raise PydanticCustomError(UNKNOWN_KEY, "{reason}", {"key": key, "reason": reason})
        return given


class ProviderSection(Section):
    base_url: BaseURL | None = None
    """Only `openai` may leave it out: OPENAI_BASE_URL, else OpenAI's own address."""
    api_key: Secret | None = None
    """Default: ``env:OPENAI_API_KEY`` for `openai`, ``env:NAME_API_KEY`` for another."""
    key_header: HeaderName | None = None
    """The header that carries the bare key, as Azure's `api-key`; left out: a bearer token."""
    priced_as: Text | None = None
    """Default: the provider's own name."""
    connect_timeout: PositiveDuration = timedelta(seconds=5)
    read_timeout: PositiveDuration = timedelta(seconds=120)
    total_timeout: PositiveDuration = timedelta(seconds=600)
    headers: Headers = {}


class _CalledSection(Section):
    """Who is called, and for how long; what is left out holds as the provider's section says."""

    provider: Name
    model: Text
    connect_timeout: PositiveDuration | None = None
    read_timeout: PositiveDuration | None = None
    total_timeout: PositiveDuration | None = None

    @property
    def target(self) -> Target:
        return Target(self.provider, self.model)

    def timeouts(self, of_provider: ProviderSection) -> Timeouts | None:
        """Return its own timeouts, where it has any."""
        if not (self.connect_timeout or self.read_timeout or self.total_timeout):
            return None
        return Timeouts(
            connect=self.connect_timeout or of_provider.connect_timeout,
            read=self.read_timeout or of_provider.read_timeout,
            total=self.total_timeout or of_provider.total_timeout,
        )


class TargetSection(_CalledSection):
    weight: Count = 1


class FallbackSection(_CalledSection):
    on: tuple[Trouble, ...]


class RouteSection(Section):
    targets: tuple[TargetSection, ...]
    strategy: Strategy = Strategy.WEIGHTED
    fallbacks: tuple[FallbackSection, ...] = ()
    answer: LongText | None = None
    """Given, marked as such, where the job would fail because no target answers it."""

    @property
    def called(self) -> tuple[TargetSection | FallbackSection, ...]:
        return (*self.targets, *self.fallbacks)

    def route(self, name: RouteName, providers: Mapping[str, ProviderSection]) -> Route:
        own = {each.target: each.timeouts(providers[each.provider]) for each in self.called}
        return Route(
            name=name,
            targets=tuple(each.target for each in self.targets),
            weights=tuple(each.weight for each in self.targets),
            strategy=self.strategy,
            fallbacks=tuple(Fallback(frozenset(each.on), each.target) for each in self.fallbacks),
            answer=self.answer,
            timeouts={target: timeouts for target, timeouts in own.items() if timeouts},
        )


class PriceSection(Section):
    """Dollars per million tokens; `request` is dollars per call, `tools` dollars each time one is used."""

    # These two, and input before output: what is checked later looks at what was checked before.
    tools: Mapping[HostedTool, Dollars] = {}
    context: Count | None = None
    """The most tokens that the model reads at once, which bounds what hosted tools let it read."""
    input: Dollars | None = Field(default=None, validate_default=True)
    """It and `output` may be left out where the bundled list knows them, for `tools` and `context` alone."""
    cached_input: Dollars | None = None
    cache_write: Dollars | None = None
    output: Dollars | None = Field(default=None, validate_default=True)
    request: Dollars = Decimal(0)

    @field_validator("input", "output")
    @classmethod
    def _be_whole(cls, price: Decimal | None, info: ValidationInfo) -> Decimal | None:
        needed = not (info.data.get("tools") or info.data.get("context"))
        needed = needed or (info.field_name == "output" and info.data.get("input") is not None)
        if price is None and needed:
            raise PydanticCustomError("missing", "is missing")
        if price is not None and info.field_name == "output" and info.data.get("input") is None:
            raise PydanticCustomError("without_input", "needs input beside it")
        return price


class LimitSection(Section):
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    concurrent: Count | None = None


class TenantSection(Section):
    weight: Count = 1
    """Of its share of a lane, by cost."""
    concurrent: Count | None = None
    """How many of its jobs run at a time, at most, in all lanes together."""


class KeySection(Section):
    concurrent: Count
    """How many of the jobs that came with it run at a time, at most, in all lanes and of all tenants."""


class RetrySection(Section):
    max_attempts: Count = 6
    initial: PositiveDuration = timedelta(seconds=1)
    maximum: PositiveDuration = timedelta(seconds=60)
    slot_wait: Duration = timedelta(seconds=2)
    retry_after_cap: PositiveDuration = timedelta(seconds=120)
    budget: Share = 0.1
    """Retries of the whole fleet beside a provider's successes."""
    floor: Count = 10
    """So many in ten seconds are always allowed."""


class BreakerSection(Section):
    failure_rate: Share = 0.5
    minimum_calls: Count = 20
    window: PositiveDuration = timedelta(seconds=30)
    cooldown: PositiveDuration = timedelta(seconds=10)
    probe_lease: PositiveDuration = timedelta(seconds=30)


class WebhookSection(Section):
    secret: Secret = SecretReference("env:HEADRACE_WEBHOOK_SECRET")
    previous_secret: Secret | None = None
    timeout: PositiveDuration = timedelta(seconds=15)
    schedule: tuple[Duration, ...] = (
        timedelta(0),
        timedelta(seconds=5),
        timedelta(minutes=5),
        timedelta(minutes=30),
        *(timedelta(hours=hours) for hours in (2, 5, 10, 14, 20, 24)),
    )


class AlertSection(Section):
    """Who is told how far budgets are used."""

    url: EventURL | None = None
    """Called like a webhook, under the same guard; None: nobody is called."""


class DefaultSection(Section):
    max_output_tokens: Count = 1024
    max_body_bytes: Count = 1_048_576
    provider: Name = DEFAULT_PROVIDER
    any_model: Flag = True
    lane: Name = "default"
    retention_days: Count = 30
    idempotency_days: Count = 7
    suspense_after: PositiveDuration = timedelta(hours=24)
    """How long a call may stand in suspense before it is settled as `suspense_as`."""
    suspense_as: SuspenseRule = SuspenseRule.BILLED

    @property
    def retention(self) -> timedelta:
        return timedelta(days=self.retention_days)

    @property
    def idempotency(self) -> timedelta:
        return timedelta(days=self.idempotency_days)
