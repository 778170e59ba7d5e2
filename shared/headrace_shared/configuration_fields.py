"""The kinds of values that ``headrace.toml`` holds, as pydantic field types."""

import re
from datetime import timedelta
from decimal import Decimal, InvalidOperation
from ipaddress import ip_network
from typing import Annotated, TypeAlias
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, PlainValidator

from headrace_shared.durations import format_duration, parse_duration
from headrace_shared.errors import InvalidWebhook
from headrace_shared.ids import TENANT_NAME
from headrace_shared.money import MAX_AMOUNT, NANO_PER_USD
from headrace_shared.routes import Target
from headrace_shared.secrets import SecretReference
from headrace_shared.webhooks import check_url

_ANYWHERE = (ip_network("0.0.0.0/0"), ip_network("::/0"))
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_SECRET = re.compile(r"auth|key|token|secret|cookie|^sig", re.IGNORECASE)
_HEADER = re.compile(r"[A-Za-z0-9-]{1,64}")


def _parse_positive_duration(given: object) -> timedelta:
    duration = parse_duration(given)
    if not duration:
        raise ValueError("must be longer than 0 s")
    return duration


def _parse_dollars(given: object) -> Decimal:
    """Read dollars exactly: a TOML float arrives as the decimal that was written."""
    dollars: Decimal | None = None
    if isinstance(given, str | int | float | Decimal) and not isinstance(given, bool):
        try:
            dollars = Decimal(str(given).strip())
        except InvalidOperation:
            dollars = None
    nano = dollars * NANO_PER_USD if dollars is not None and dollars.is_finite() else Decimal(-1)
    if dollars is None or not 0 <= nano <= MAX_AMOUNT or nano != nano.to_integral_value():
        raise ValueError('must be an amount of dollars such as "0.15", with at most nine decimal places')
    return dollars


def _write_dollars(dollars: Decimal) -> str:
    return format(dollars.normalize(), "f")


def _parse_share(given: object) -> float:
    is_number = isinstance(given, int | float | Decimal) and not isinstance(given, bool)
    share = float(given) if isinstance(given, int | float | Decimal) and is_number else -1.0
    if not 0 < share <= 1:
        raise ValueError("must be a number above 0 and up to 1")
    return share


def _parse_secret(given: object) -> SecretReference:
    if isinstance(given, SecretReference):
        return given
    return SecretReference(given if isinstance(given, str) else "")


def _check_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError("must be a name of lower-case letters, digits, dots, dashes and underscores")
    return name


def _check_tenant(name: str) -> str:
    if not TENANT_NAME.fullmatch(name):
        raise ValueError("must be 1 to 64 letters, digits, dots, dashes and underscores")
    return name


def _check_target(text: str) -> str:
    Target.parse(text)
    return text


def _check_limiter(text: str) -> str:
    return _check_target(text) if "/" in text else _check_name(text)


def _check_base_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        sound = parts.scheme in {"http", "https"} and bool(parts.hostname) and not parts.fragment
    except ValueError:
        sound = False
        parts = urlsplit("")
    if not sound:
        raise ValueError("must be an address such as https://api.openai.com/v1")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must not hold a user or a password: name the secret as api_key")
    names = [name for name, _ in parse_qsl(parts.query, keep_blank_values=True)]
    secret = next(filter(_SECRET.search, names), None)
    if secret is not None:
        raise ValueError(f"must not hold a secret ({secret}): name it as api_key, or in headers")
    return urlunsplit(parts._replace(path=parts.path.rstrip("/")))


def _check_header_name(name: str) -> str:
    if not _HEADER.fullmatch(name):
        raise ValueError("must be the name of a header, such as api-key")
    return name


def _check_event_url(url: str) -> str:
    # Which private networks may be reached is the environment's to say, whenever it is dialled.
    try:
        return check_url(url, allow_http=True, allowed_networks=_ANYWHERE)
    except InvalidWebhook as error:
        raise ValueError(error.reason) from None


def _check_headers(headers: dict[str, str]) -> dict[str, str]:
    for name, value in headers.items():
        if _SECRET.search(name):
            try:
                SecretReference(value)
            except ValueError as error:
                raise ValueError(f"the header {name} {error}") from None
    return headers


Duration: TypeAlias = Annotated[timedelta, BeforeValidator(parse_duration), PlainSerializer(format_duration)]
PositiveDuration: TypeAlias = Annotated[
    timedelta, BeforeValidator(_parse_positive_duration), PlainSerializer(format_duration)
]
Dollars: TypeAlias = Annotated[Decimal, BeforeValidator(_parse_dollars), PlainSerializer(_write_dollars)]
Share: TypeAlias = Annotated[float, BeforeValidator(_parse_share)]
Count: TypeAlias = Annotated[int, Field(strict=True, ge=1, le=2**31 - 1)]
Flag: TypeAlias = Annotated[bool, Field(strict=True)]
Text: TypeAlias = Annotated[str, Field(strict=True, min_length=1, max_length=200)]
LongText: TypeAlias = Annotated[str, Field(strict=True, min_length=1, max_length=20_000)]
Name: TypeAlias = Annotated[str, Field(strict=True), AfterValidator(_check_name)]
LimiterName: TypeAlias = Annotated[str, Field(strict=True), AfterValidator(_check_limiter)]
TargetName: TypeAlias = Annotated[str, Field(strict=True), AfterValidator(_check_target)]
TenantName: TypeAlias = Annotated[str, Field(strict=True), AfterValidator(_check_tenant)]
KeyName: TypeAlias = TenantName
"""What an API key may be called is what a tenant may."""
BaseURL: TypeAlias = Annotated[str, Field(strict=True), AfterValidator(_check_base_url)]
EventURL: TypeAlias = Annotated[str, Field(strict=True), AfterValidator(_check_event_url)]
HeaderName: TypeAlias = Annotated[str, Field(strict=True), AfterValidator(_check_header_name)]
Headers: TypeAlias = Annotated[dict[str, str], AfterValidator(_check_headers)]
Secret: TypeAlias = Annotated[
    SecretReference, PlainValidator(_parse_secret), PlainSerializer(str, return_type=str)
]
