"""Where a model's requests go."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from headrace_shared.ids import RouteName
from headrace_shared.policy import Timeouts
from headrace_shared.secrets import SecretReference


@dataclass(frozen=True, slots=True)
class Target:
    """One model of one provider: what is priced, limited and guarded.

    >>> str(Target("openai", "gpt-4o-mini"))
    'openai/gpt-4o-mini'
    """

    provider: str
    model: str

    def __str__(self) -> str:
        return f"{self.provider}/{self.model}"

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Read ``provider/model``; the model may contain further slashes.

        Raises:
            ValueError: one of the two is missing.

        """
        provider, _, model = text.partition("/")
        if not provider or not model:
            raise ValueError("must be named provider/model")
        return cls(provider, model)


@dataclass(frozen=True, slots=True)
class Route:
    """The targets that may answer for a public model name."""

    name: RouteName
    targets: tuple[Target, ...]
    """At least one."""
    weights: tuple[int, ...]
    """The share of each target, in the same order."""


@dataclass(frozen=True, slots=True)
class Provider:
    """How to reach a provider; its base URL has no slash at the end."""

    name: str
    base_url: str
    api_key: SecretReference
    priced_as: str
    """The provider's id in the price data."""
    timeouts: Timeouts
    headers: Mapping[str, str] = field(default_factory=dict[str, str], hash=False)
    """Literal values, or ``env:NAME`` and ``file:PATH`` references."""

    def resolve_headers(self) -> dict[str, str]:
        """Return the headers to send, with the references read.

        Raises:
            MissingSetting: a referenced variable or file is missing.

        """
        return {name: _resolve(value) for name, value in self.headers.items()}


def _resolve(value: str) -> str:
    is_reference = value.startswith(("env:", "file:"))
    return SecretReference(value).resolve().reveal() if is_reference else value
