"""What the environment says: where the servers are, and how this process runs.

Everything about providers, prices and limits is configuration instead: it is kept in
Postgres, in versions, so that all processes see the same.
"""

from datetime import timedelta
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, cast

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from headrace_shared.errors import InvalidConfiguration, MissingSetting
from headrace_shared.ids import Lane
from headrace_shared.validation import plain_reason


class Settings(BaseSettings):
    """The variables HEADRACE_*; a name here is a variable's without its prefix."""

    model_config = SettingsConfigDict(env_prefix="HEADRACE_", frozen=True, extra="ignore")

    postgres_url: str | None = Field(default=None, repr=False)
    """`postgresql://user:password@host/database`, or `postgresql:///database?host=/socket/dir`."""
    redis_url: str | None = Field(default=None, repr=False)
    """`redis://`, `rediss://`, or `unix:///path/to/socket`."""
    config: Path | None = None
    """The headrace.toml that `headrace config apply` takes when none is named."""
    pooler: bool = False
    """True when the URL leads through PgBouncer in transaction mode."""
    listen_url: str | None = Field(default=None, repr=False)
    """A direct URL for LISTEN where `postgres_url` is a pooler's; without it the feeder polls."""

    concurrency: int = Field(default=100, ge=1, le=10_000)
    """Jobs that one worker runs at a time."""
    lanes: Annotated[tuple[str, ...], NoDecode] = ()
    """Lanes that this worker serves; all of them when empty."""
    handlers: Annotated[tuple[str, ...], NoDecode] = ()
    """Modules with handlers of the application's own, as `app.tasks` or `app.tasks:summarise`."""
    lease_seconds: float = Field(default=30, ge=1, le=3600)
    drain_seconds: float = Field(default=20, ge=0, le=3600)
    """How long running jobs may take to end after SIGTERM."""
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    metrics_host: str = "127.0.0.1"
    metrics_tenants: bool = False
    """Whether metrics tell tenants apart, and show their budgets: each has so many series at most
    (`telemetry.MAX_SERIES`), and counts what comes after them as `other`."""

    webhook_allowed_networks: Annotated[tuple[IPv4Network | IPv6Network, ...], NoDecode] = ()
    """Networks that callbacks may reach although they are private."""
    webhook_allow_http: bool = False

    @field_validator("lanes", "handlers", mode="before")
    @classmethod
    def _split_names(cls, value: object) -> object:
        return (
            tuple(part.strip() for part in value.split(",") if part.strip())
            if isinstance(value, str)
            else value
        )

    @field_validator("webhook_allowed_networks", mode="before")
    @classmethod
    def _split_networks(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        return tuple(ip_network(part.strip(), strict=False) for part in value.split(",") if part.strip())

    @property
    def lease(self) -> timedelta:
        return timedelta(seconds=self.lease_seconds)

    @property
    def drain(self) -> timedelta:
        return timedelta(seconds=self.drain_seconds)

    @property
    def served_lanes(self) -> tuple[Lane, ...]:
        return tuple(Lane(lane) for lane in self.lanes)

    def environment(self) -> dict[str, str]:
        """Return the variables that a process must be given to have these settings."""
        return {
            f"HEADRACE_{name.upper()}": _written(value)
            for name in type(self).model_fields
            if (value := cast("object", getattr(self, name))) is not None
        }

    def require_postgres(self) -> str:
        """Return the URL of Postgres.

        Raises:
            MissingSetting: there is none.

        """
        if not self.postgres_url:
            raise MissingSetting(
                where="HEADRACE_POSTGRES_URL",
                reason="set it to postgresql://host/database, or run 'headrace up' for servers of its own",
            )
        return self.postgres_url

    def require_redis(self) -> str:
        """Return the URL of Redis.

        Raises:
            MissingSetting: there is none.

        """
        if not self.redis_url:
            raise MissingSetting(
                where="HEADRACE_REDIS_URL",
                reason="set it to redis://host, or run 'headrace up' for servers of its own",
            )
        return self.redis_url


def _written(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(str(part) for part in cast("tuple[object, ...]", value))
    return str(value)


def load_settings(**given: object) -> Settings:
    """Read the environment; what is given here comes first.

    Raises:
        InvalidConfiguration: names the first variable that is wrong, and how.

    """
    try:
        return Settings.model_validate({**Settings().model_dump(), **given}) if given else Settings()
    except ValidationError as error:
        first = error.errors()[0]
        name = "_".join(str(part) for part in first["loc"][:1]).upper()
        raise InvalidConfiguration(where=f"HEADRACE_{name}", reason=plain_reason(first["msg"])) from None
