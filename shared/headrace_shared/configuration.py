"""What ``headrace.toml`` may say: providers, routes, prices, limits, and how the parts behave.

A configuration is kept in Postgres in versions as its `document`, which names secrets
and never holds one. Everything has a default: no file at all is a configuration too.
"""

import difflib
import json
import os
import re
import tomllib
from collections.abc import Mapping
from datetime import timedelta
from decimal import Decimal
from functools import cached_property
from typing import Self

from pydantic import ValidationError, field_validator, model_validator

from headrace_shared.configuration_errors import (
    invalid_configuration,
    toml_path,
)
from headrace_shared.configuration_fields import (
    Count,
    KeyName,
    LimiterName,
    Name,
    PositiveDuration,
    TargetName,
    TenantName,
    Text,
)
from headrace_shared.configuration_sections import (
    DEFAULT_PROVIDER,
    AlertSection,
    BreakerSection,
    DefaultSection,
    KeySection,
    LimitSection,
    PriceSection,
    ProviderSection,
    RetrySection,
    RouteSection,
    Section,
    TenantSection,
    WebhookSection,
)
from headrace_shared.errors import InvalidConfiguration, InvalidRequest
from headrace_shared.ids import Lane, RouteName, Tenant
from headrace_shared.jsonvalue import is_table
from headrace_shared.limits import Ceiling, limiter_name
from headrace_shared.policy import (
    BreakerPolicy,
    RetryPolicy,
    SuspensePolicy,
    Terms,
    Timeouts,
    WebhookPolicy,
)
from headrace_shared.routes import STATIC_PROVIDER, Provider, Route, Target, Trouble
from headrace_shared.secrets import SecretReference

DEFAULT_BASE_URL = "https://api.openai.com/v1"
DEFAULT_LANES: Mapping[str, int] = {"interactive": 8, "default": 4, "batch": 1}
SHORTEST_LEASE = timedelta(seconds=1)
LONGEST_LEASE = timedelta(hours=1)

_ROUTES_KEPT = 4096


class Configuration(Section):
    """One version of what ``headrace.toml`` says, checked as a whole; equal ones are interchangeable."""

    providers: Mapping[Name, ProviderSection] = {DEFAULT_PROVIDER: ProviderSection()}
    routes: Mapping[Text, RouteSection] = {}
    prices: Mapping[TargetName, PriceSection] = {}
    limits: Mapping[LimiterName, LimitSection] = {}
    """Of a provider in all, or of one of its models: a call keeps both."""
    lanes: Mapping[Name, Count] = DEFAULT_LANES
    """The three default lanes always exist; a file changes their weights or adds others."""
    leases: Mapping[Name, PositiveDuration] = {}
    """Of the lanes whose jobs are held longer, or shorter, than a worker's own lease says."""
    tenants: Mapping[TenantName, TenantSection] = {}
    keys: Mapping[KeyName, KeySection] = {}
    """The API keys of an application's users, by the names that jobs come with."""
    retries: RetrySection = RetrySection()
    breaker: BreakerSection = BreakerSection()
    webhooks: WebhookSection = WebhookSection()
    alerts: AlertSection = AlertSection()
    defaults: DefaultSection = DefaultSection()

    @classmethod
    def default(cls) -> Self:
        """Return the configuration of no file at all."""
        return cls()

    @classmethod
    def from_document(cls, document: Mapping[str, object]) -> Self:
        """Read what `document` wrote, or any mapping of the same shape.

        Raises:
            InvalidConfiguration: names the key, as a TOML path, and what is wrong with it.

        """
        try:
            return cls.model_validate(dict(document))
        except ValidationError as error:
            raise invalid_configuration(error) from None

    def document(self) -> dict[str, object]:
        """Return what was said, without the defaults, as a value that JSON can carry."""
        return self.model_dump(mode="json", exclude_unset=True)

    def provider(self, name: str) -> Provider:
        """Return how to reach a provider.

        Raises:
            InvalidConfiguration: there is none of that name.

        """
        section = self.providers.get(name)
        if section is None:
            raise InvalidConfiguration(
                where=toml_path(("providers", name)), reason="there is no such provider"
            )
        environment = os.environ.get("OPENAI_BASE_URL") if name == DEFAULT_PROVIDER else None
        variable = re.sub(r"[^A-Z0-9]", "_", name.upper())
        return Provider(
            name=name,
            base_url=section.base_url or (environment or DEFAULT_BASE_URL).rstrip("/"),
            api_key=section.api_key or SecretReference(f"env:{variable}_API_KEY"),
            priced_as=section.priced_as or name,
            timeouts=Timeouts(
                connect=section.connect_timeout, read=section.read_timeout, total=section.total_timeout
            ),
            key_header=section.key_header,
            headers=section.headers,
        )

    def resolve_route(self, model: str) -> Route:
        """Return the targets that answer for a model's public name.

        Raises:
            InvalidRequest: there is no such route, and ``defaults.any_model`` is false.

        """
        route = self._resolved.get(model)
        if route is None:
            route = self._resolve(model)
            if len(self._resolved) >= _ROUTES_KEPT:
                self._resolved.clear()
            self._resolved[model] = route
        return route

    def ceilings(self) -> Mapping[str, Ceiling]:
        """Return the limits by limiter, as the dispatch names it."""
        return self._ceilings

    def lane_weights(self) -> Mapping[Lane, int]:
        return {Lane(name): weight for name, weight in self.lanes.items()}

    def lane_leases(self) -> Mapping[Lane, timedelta]:
        """Return the leases of the lanes that have one of their own."""
        return {Lane(name): lease for name, lease in self.leases.items()}

    def terms(self, version: int) -> Terms:
        """Return what tenants and API keys get of the workers, as this version says."""
        return Terms(
            version,
            {Tenant(name): each.weight for name, each in self.tenants.items() if each.weight != 1},
            {Tenant(name): each.concurrent for name, each in self.tenants.items() if each.concurrent},
            {name: each.concurrent for name, each in self.keys.items()},
        )

    def retry_policy(self) -> RetryPolicy:
        return RetryPolicy(
            max_attempts=self.retries.max_attempts,
            initial=self.retries.initial,
            maximum=self.retries.maximum,
            slot_wait=self.retries.slot_wait,
            retry_after_cap=self.retries.retry_after_cap,
            budget=self.retries.budget,
            floor=self.retries.floor,
        )

    def breaker_policy(self) -> BreakerPolicy:
        return BreakerPolicy(
            failure_rate=self.breaker.failure_rate,
            minimum_calls=self.breaker.minimum_calls,
            window=self.breaker.window,
            cooldown=self.breaker.cooldown,
            probe_lease=self.breaker.probe_lease,
        )

    def suspense_policy(self) -> SuspensePolicy:
        return SuspensePolicy(after=self.defaults.suspense_after, rule=self.defaults.suspense_as)

    def webhook_policy(self) -> WebhookPolicy:
        return WebhookPolicy(
            secret=self.webhooks.secret,
            previous_secret=self.webhooks.previous_secret,
            timeout=self.webhooks.timeout,
            schedule=self.webhooks.schedule,
        )

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(json.dumps(self.model_dump(mode="json"), sort_keys=True))

    @cached_property
    def _ceilings(self) -> Mapping[str, Ceiling]:
        return {
            limiter_name(name): Ceiling(
                section.requests_per_minute, section.tokens_per_minute, section.concurrent
            )
            for name, section in self.limits.items()
        }

    @cached_property
    def _resolved(self) -> dict[str, Route]:
        return {}

    def _resolve(self, model: str) -> Route:
        section = self.routes.get(model)
        if section is not None:
            return section.route(RouteName(model), self.providers)
        if self.defaults.any_model:
            return Route(RouteName(model), (Target(self.defaults.provider, model),), (1,))
        near = difflib.get_close_matches(model, self.routes, n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InvalidRequest(field="model", reason=f"there is no route {model!r}{hint}")

    @field_validator("providers", mode="before")
    @classmethod
    def _always_have_openai(cls, given: object) -> object:
        return {DEFAULT_PROVIDER: {}, **given} if is_table(given) else given

    @field_validator("lanes", mode="before")
    @classmethod
    def _always_have_the_lanes(cls, given: object) -> object:
        return {**DEFAULT_LANES, **given} if is_table(given) else given

    @model_validator(mode="after")
    def _hang_together(self) -> Self:
        _check_providers(self)
        _check_routes(self)
        _check_policies(self)
        return self


def parse_toml(text: str, source: str) -> Configuration:
    """Read the text of a ``headrace.toml``; ``source`` is its path, for messages.

    Raises:
        InvalidConfiguration: names the line, or the key as a TOML path, and what is wrong with it.

    """
    try:
        document = tomllib.loads(text, parse_float=Decimal)
    except tomllib.TOMLDecodeError as error:
        reason, _, place = str(error).partition(" (at ")
        line = re.match(r"line \d+", place)
        where = f"{source}, {line[0] if line else 'last line'}"
        raise InvalidConfiguration(where=where, reason=f"is not TOML: {reason}") from None
    return Configuration.from_document(document)


def _check_providers(configuration: Configuration) -> None:
    for name, section in configuration.providers.items():
        if name == STATIC_PROVIDER:
            reason = "is the name under which a route's own answer is booked"
            raise InvalidConfiguration(where=toml_path(("providers", name)), reason=reason)
        if name != DEFAULT_PROVIDER and section.base_url is None:
            raise InvalidConfiguration(where=toml_path(("providers", name, "base_url")), reason="is missing")
    _check_provider(configuration, configuration.defaults.provider, ("defaults", "provider"))
    for table, names in (("prices", configuration.prices), ("limits", configuration.limits)):
        for name in names:
            _check_provider(configuration, name.partition("/")[0], (table, name))


def _check_routes(configuration: Configuration) -> None:
    for name, route in configuration.routes.items():
        if not route.targets:
            raise InvalidConfiguration(
                where=toml_path(("routes", name, "targets")), reason="must have at least one target"
            )
        for kind, called in (("targets", route.targets), ("fallbacks", route.fallbacks)):
            for index, each in enumerate(called):
                _check_provider(configuration, each.provider, ("routes", name, kind, index, "provider"))
        for index, fallback in enumerate(route.fallbacks):
            if not fallback.on:
                where = toml_path(("routes", name, "fallbacks", index, "on"))
                raise InvalidConfiguration(where=where, reason=f"must name any of {', '.join(Trouble)}")


def _check_provider(configuration: Configuration, name: str, places: tuple[str | int, ...]) -> None:
    if name not in configuration.providers:
        known = ", ".join(sorted(configuration.providers))
        raise InvalidConfiguration(
            where=toml_path(places), reason=f"there is no provider {name!r}, only {known}"
        )


def _check_policies(configuration: Configuration) -> None:
    if configuration.defaults.lane not in configuration.lanes:
        known = ", ".join(configuration.lanes)
        raise InvalidConfiguration(where="defaults.lane", reason=f"there is no such lane, only {known}")
    for lane, lease in configuration.leases.items():
        where = toml_path(("leases", lane))
        if lane not in configuration.lanes:
            raise InvalidConfiguration(where=where, reason="there is no such lane")
        if not SHORTEST_LEASE <= lease <= LONGEST_LEASE:
            raise InvalidConfiguration(where=where, reason='must be from "1s" to "1h"')
    if configuration.retries.initial > configuration.retries.maximum:
        raise InvalidConfiguration(where="retries.initial", reason="must not be longer than retries.maximum")
    if not configuration.webhooks.schedule:
        raise InvalidConfiguration(
            where="webhooks.schedule", reason="must name at least one delivery attempt"
        )
