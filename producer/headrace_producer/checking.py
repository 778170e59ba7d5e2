"""What a caller hands in becomes a job here, or is refused with the field and the reason."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeGuard

from headrace_producer.in_force import Snapshot
from headrace_shared import webhooks
from headrace_shared.errors import InvalidRequest, InvalidWebhook
from headrace_shared.ids import Lane, Tenant, new_job_id
from headrace_shared.job import NewJob
from headrace_shared.request import check_request
from headrace_shared.settings import Settings

MAX_ATTEMPTS = 100
MAX_DELAY = timedelta(days=365)
MAX_KEY_LENGTH = 255
MAX_METADATA_PAIRS = 16
MAX_METADATA_KEY_LENGTH = 64
MAX_METADATA_VALUE_LENGTH = 512

_TENANT = re.compile(r"[A-Za-z0-9._-]{1,64}")
_NO_DELAY = timedelta(0)


@dataclass(frozen=True, slots=True)
class JobRequest:
    """One job to enqueue; what is None is the client's, or the configuration's, default."""

    endpoint: str
    """A path of the provider's API, such as `/v1/chat/completions`."""
    body: Mapping[str, object] | bytes | str
    """The request in the provider's wire format; bytes are kept as they are."""
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
        checked = check_request(
            _text(request.endpoint, "endpoint"), _body(request.body), max_body_bytes=defaults.max_body_bytes
        )
        return NewJob(
            id=new_job_id(),
            tenant=self._tenant if request.tenant is None else check_tenant(request.tenant),
            lane=_lane(defaults.lane if request.lane is None else request.lane, snapshot),
            route=snapshot.priced_route(checked.model, checked.endpoint),
            endpoint=checked.endpoint,
            body=checked.body,
            max_attempts=_attempts(snapshot.configuration.retries.max_attempts, request.max_attempts),
            delay=_NO_DELAY if request.delay is None else _delay(request.delay),
            idempotency_key=None if request.idempotency_key is None else _key(request.idempotency_key),
            digest=checked.digest,
            webhook=None if request.webhook is None else self._webhook(request.webhook),
            metadata=None if request.metadata is None else _metadata(request.metadata),
            traceparent=traceparent,
        )

    def _webhook(self, url: object) -> str:
        if not isinstance(url, str):
            raise InvalidWebhook(reason="must be a string")
        return webhooks.check_url(url, allow_http=self._allow_http, allowed_networks=self._networks)


def check_tenant(tenant: object) -> Tenant:
    if not isinstance(tenant, str) or not _TENANT.fullmatch(tenant):
        raise InvalidRequest(
            field="tenant", reason="must be 1 to 64 letters, digits, dots, dashes and underscores"
        )
    return Tenant(tenant)


def _text(value: object, field: str) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(field=field, reason="must be a string")
    return value


def _body(body: object) -> Mapping[str, object] | bytes | str:
    if isinstance(body, bytes | str) or _is_mapping(body):
        return body
    raise InvalidRequest(field="body", reason="must be a mapping, or the bytes or the text of a JSON object")


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


def _delay(delay: object) -> timedelta:
    if not isinstance(delay, timedelta) or not _NO_DELAY <= delay <= MAX_DELAY:
        raise InvalidRequest(field="delay", reason=f"must be a timedelta from 0 to {MAX_DELAY.days} days")
    return delay


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
