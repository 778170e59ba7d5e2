"""What a caller hands in becomes a job here, or is refused with the field and the reason."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import TypeGuard

from pydantic import BaseModel

from headrace_producer.in_force import Snapshot
from headrace_producer.timing import check_ahead, check_timing
from headrace_shared import webhooks
from headrace_shared.errors import InvalidAmount, InvalidRequest, InvalidWebhook
from headrace_shared.handlers import (
    HandlerEndpoint,
    handler_endpoint,
    handler_lane,
    handler_of,
    parse_handler_name,
)
from headrace_shared.ids import TENANT_NAME, Lane, RouteName, Tenant, new_job_id
from headrace_shared.job import NewJob
from headrace_shared.jsonvalue import refuse_not_finite
from headrace_shared.money import NanoUSD, parse_usd
from headrace_shared.request import Endpoint, check_input, check_request
from headrace_shared.scopes import check_api_key_name, check_tags
from headrace_shared.settings import Settings

MAX_ATTEMPTS = 100
MAX_KEY_LENGTH = 255
MAX_METADATA_PAIRS = 16
MAX_METADATA_KEY_LENGTH = 64
MAX_METADATA_VALUE_LENGTH = 512


@dataclass(frozen=True, slots=True)
class JobRequest:
    """One job to enqueue; what is None is the client's, or the configuration's, default."""

    endpoint: str
    """A path of the provider's API, such as `/v1/chat/completions`, or the name of a handler."""
    body: Mapping[str, object] | bytes | str | BaseModel
    """The request in the provider's wire format, or a handler's input; bytes are kept as they are."""
    tenant: str | None = None
    lane: str | None = None
    idempotency_key: str | None = None
    """At most 255 printable characters; the same key and body of a tenant is the same job."""
    webhook: str | None = None
    """An https URL that is called when the job has ended."""
    metadata: Mapping[str, str] | None = None
    """At most 16 pairs, keys of 64 and values of 512 characters; comes back with the job."""
    delay: timedelta | None = None
    max_attempts: int | None = None
    run_at: datetime | None = None
    """When it is due, by the caller's clock; instead of `delay`."""
    ttl: timedelta | None = None
    """From when it is due until it must have been started."""
    deadline: datetime | None = None
    """When it must have ended. One that has passed is refused; with an `idempotency_key`, under which the
    job may be there already, it ends a new one as expired."""
    timeout: timedelta | None = None
    """What it may take from its first start, waits between its attempts included."""
    tags: Sequence[str] = ()
    """At most 8, of 64 characters each: what its cost is counted under, beside its tenant and its model."""
    api_key: str | None = None
    """The name of the API key that it came with: another thing that its cost is counted under."""
    max_cost: Decimal | str | int | None = None
    """Dollars that all its calls may cost together; what could cost more fails."""
    share: bool | None = None
    """Whether the answer to an identical job of the tenant that is under way may be this one's as well.
    By default where the same answer is expected: embeddings, moderations, temperature 0."""


class Checker:
    """Turns requests into jobs."""

    def __init__(self, tenant: str, settings: Settings) -> None:
        self._tenant = check_tenant(tenant)
        self._allow_http = settings.webhook_allow_http
        self._networks = settings.webhook_allowed_networks

    def check(self, request: JobRequest, snapshot: Snapshot, traceparent: str | None) -> NewJob:
        """Return the job of a request.

        Raises:
            InvalidInput: in one of its kinds, which names the field.

        """
        defaults = snapshot.configuration.defaults
        asked = _asked(_text(request.endpoint, "endpoint"), _body(request.body), snapshot)
        lane = _lane(defaults.lane if request.lane is None else request.lane, snapshot)
        handler = handler_of(asked.endpoint)
        timing = check_timing(request.delay, request.run_at, request.ttl, request.deadline, request.timeout)
        if request.idempotency_key is None:
            # With a key the job may be there already: saying the same again later is no mistake.
            check_ahead("deadline", timing.deadline)
        return NewJob(
            id=new_job_id(),
            tenant=self._tenant if request.tenant is None else check_tenant(request.tenant),
            lane=lane if handler is None else handler_lane(lane, handler),
            route=asked.route,
            endpoint=asked.endpoint,
            body=asked.body,
            max_attempts=_attempts(snapshot.configuration.retries.max_attempts, request.max_attempts),
            delay=timing.delay,
            idempotency_key=None if request.idempotency_key is None else _key(request.idempotency_key),
            digest=asked.digest,
            webhook=None if request.webhook is None else self._webhook(request.webhook),
            metadata=None if request.metadata is None else _metadata(request.metadata),
            traceparent=traceparent,
            run_at=timing.run_at,
            ttl=timing.ttl,
            deadline=timing.deadline,
            timeout=timing.timeout,
            tags=check_tags(request.tags) if request.tags else (),
            api_key=None if request.api_key is None else check_api_key_name(request.api_key),
            max_cost=None if request.max_cost is None else _max_cost(request.max_cost),
            shares=_shares(request.share, asked),
            hosted_tools=asked.hosted_tools,
        )

    def _webhook(self, url: object) -> str:
        if not isinstance(url, str):
            raise InvalidWebhook(reason="must be a string")
        return webhooks.check_url(url, allow_http=self._allow_http, allowed_networks=self._networks)


def check_tenant(tenant: object) -> Tenant:
    if not isinstance(tenant, str) or not TENANT_NAME.fullmatch(tenant):
        raise InvalidRequest(
            field="tenant", reason="must be 1 to 64 letters, digits, dots, dashes and underscores"
        )
    return Tenant(tenant)


def _text(value: object, field: str) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(field=field, reason="must be a string")
    return value


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a job is to do."""

    endpoint: Endpoint | HandlerEndpoint
    route: RouteName
    body: bytes
    digest: bytes
    repeatable: bool = False
    hosted_tools: bool = False


def _asked(endpoint: str, body: Mapping[str, object] | bytes | str, snapshot: Snapshot) -> _Asked:
    most = snapshot.configuration.defaults.max_body_bytes
    if endpoint.startswith("/"):
        checked = check_request(endpoint, body, max_body_bytes=most)
        hosted = checked.bounds.hosted
        route = snapshot.priced_route(checked.model, checked.endpoint, hosted)
        repeats = checked.repeatable
        return _Asked(checked.endpoint, route, checked.body, checked.digest, repeats, hosted is not None)
    name = parse_handler_name(endpoint.removeprefix("handler:"))
    if name is None:
        reason = (
            f"{endpoint[:64]!r} is neither a path that begins with / nor a handler's name "
            "(1 to 64 lower-case letters, digits, dots, dashes and underscores)"
        )
        raise InvalidRequest(field="endpoint", reason=reason)
    own = handler_endpoint(name)
    given = check_input(own, body, max_body_bytes=most)
    return _Asked(own, RouteName(own), given.body, given.digest)


def _shares(share: object, asked: _Asked) -> bool:
    if share is None:
        return asked.repeatable
    if not isinstance(share, bool):
        raise InvalidRequest(field="share", reason="must be true or false")
    if share and handler_of(asked.endpoint) is not None:
        raise InvalidRequest(field="share", reason="is for requests to a model, not for handlers")
    return share


def _body(body: object) -> Mapping[str, object] | bytes | str:
    if isinstance(body, BaseModel):
        return _dumped(body)
    if isinstance(body, bytes | str) or _is_mapping(body):
        return body
    raise InvalidRequest(
        field="body",
        reason="must be a mapping, a pydantic model, or the bytes or the text of a JSON object",
    )


def _dumped(body: BaseModel) -> Mapping[str, object]:
    try:
        # Not as JSON at once: that would make null of a number that is not finite.
        dumped: object = body.model_dump(mode="json", warnings="error")
        refuse_not_finite(body.model_dump())
    except ValueError as error:
        raise InvalidRequest(field="body", reason=f"cannot be written as JSON ({error})") from None
    if not _is_mapping(dumped):
        raise InvalidRequest(field="body", reason="must be a JSON object")
    return dumped


def _lane(lane: object, snapshot: Snapshot) -> Lane:
    lanes = snapshot.configuration.lanes
    if not isinstance(lane, str) or lane not in lanes:
        raise InvalidRequest(field="lane", reason=f"{lane!r} is not one of {', '.join(lanes)}")
    return Lane(lane)


def _attempts(default: int, attempts: object) -> int:
    if attempts is None:
        return default
    if not isinstance(attempts, int) or isinstance(attempts, bool) or not 1 <= attempts <= MAX_ATTEMPTS:
        raise InvalidRequest(field="max_attempts", reason=f"must be a whole number from 1 to {MAX_ATTEMPTS}")
    return attempts


def _max_cost(dollars: object) -> NanoUSD:
    # A float is not what somebody wrote: 0.1 is a little more than a tenth.
    if not isinstance(dollars, Decimal | str | int) or isinstance(dollars, bool):
        raise InvalidRequest(
            field="max_cost", reason="must be dollars as a Decimal, a string or a whole number"
        )
    try:
        return parse_usd(str(dollars))
    except InvalidAmount as error:
        raise InvalidRequest(field="max_cost", reason=error.message) from None


def _key(key: object) -> str:
    if not isinstance(key, str) or not 1 <= len(key) <= MAX_KEY_LENGTH or not key.isprintable():
        raise InvalidRequest(
            field="idempotency_key", reason=f"must be 1 to {MAX_KEY_LENGTH} printable characters"
        )
    return key


def _metadata(metadata: object) -> Mapping[str, str]:
    if not _is_mapping(metadata):
        raise InvalidRequest(field="metadata", reason="must be a mapping of strings to strings")
    if len(metadata) > MAX_METADATA_PAIRS:
        raise InvalidRequest(field="metadata", reason=f"must have at most {MAX_METADATA_PAIRS} pairs")
    return {_metadata_key(key): _metadata_value(key, value) for key, value in metadata.items()}


def _metadata_key(key: object) -> str:
    if not isinstance(key, str) or not 1 <= len(key) <= MAX_METADATA_KEY_LENGTH or not _can_be_kept(key):
        raise InvalidRequest(
            field="metadata",
            reason=f"the key {str(key)[:MAX_METADATA_KEY_LENGTH]!r} must be a string of 1 to "
            f"{MAX_METADATA_KEY_LENGTH} characters, none of them NUL",
        )
    return key


def _metadata_value(key: object, value: object) -> str:
    if not isinstance(value, str) or len(value) > MAX_METADATA_VALUE_LENGTH or not _can_be_kept(value):
        raise InvalidRequest(
            field=f"metadata.{key}",
            reason=f"must be a string of at most {MAX_METADATA_VALUE_LENGTH} characters, none of them NUL",
        )
    return value


def _can_be_kept(text: str) -> bool:
    """PostgreSQL keeps no NUL, UTF-8 no half of a surrogate pair."""
    return "\0" not in text and not any("\ud800" <= letter <= "\udfff" for letter in text)


def _is_mapping(value: object) -> TypeGuard[Mapping[str, object]]:
    return isinstance(value, Mapping)
