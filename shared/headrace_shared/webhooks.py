"""Signed callbacks, as the Standard Webhooks specification (1.0.0) writes them.

A receiver needs one function::

    webhooks.verify(await request.body(), request.headers, os.environ["HEADRACE_WEBHOOK_SECRET"])

and remembers the ``webhook-id`` of what it has handled: a callback comes at least once,
and has the same id each time.
"""

import base64
import hashlib
import hmac
import re
import socket
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from urllib.parse import SplitResult, urlsplit

from headrace_shared import errors
from headrace_shared.ids import Tenant
from headrace_shared.networks import Address, Network, may_reach, parse_address

SECRET_PREFIX = "whsec_"  # noqa: S105 - the mark of a secret, not one
TOLERANCE = timedelta(minutes=5)
MAX_URL_LENGTH = 2048

_URL_CHARACTERS = re.compile(r"[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=%-]+")
_HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?\.?")
_MAX_PORT = 65535


def tenant_secret(master: bytes | bytearray, tenant: Tenant) -> str:
    """Derive a tenant's ``whsec_...`` secret from the master key: the same every time, stored nowhere."""
    key = hmac.new(master, f"headrace webhook {tenant}".encode(), hashlib.sha256).digest()
    return SECRET_PREFIX + base64.b64encode(key).decode()


def sign(secret: str | Sequence[str], webhook_id: str, timestamp: datetime | int, body: bytes) -> str:
    """Return the ``webhook-signature`` of one sending.

    Args:
        secret: ``whsec_...``, or several of them while secrets are rotated: one signature each.
        webhook_id: the same for every sending of one callback.
        timestamp: when it is sent; an aware datetime, or seconds since 1970.
        body: the exact bytes that are sent.

    """
    seconds = timestamp if isinstance(timestamp, int) else int(timestamp.timestamp())
    content = f"{webhook_id}.{seconds}.".encode() + body
    return " ".join("v1," + base64.b64encode(_digest(key, content)).decode() for key in _keys(secret))


def verify(
    body: bytes,
    headers: Mapping[str, str],
    secret: str | Sequence[str],
    *,
    tolerance: timedelta = TOLERANCE,
    now: datetime | None = None,
) -> None:
    """Return if a received callback was signed with one of the secrets a moment ago.

    Args:
        body: the exact bytes that came, before any parsing.
        headers: all headers of the request, in any case.
        secret: ``whsec_...``, or several of them while secrets are rotated.
        tolerance: how far the sender's clock may be from this one, either way.
        now: the present time, for tests.

    Raises:
        WebhookVerificationFailed: a header is missing, the time is off, or no signature fits.

    """
    lowered = {name.lower(): value for name, value in headers.items()}
    seconds = _fresh_timestamp(_header(lowered, "webhook-timestamp"), tolerance, now or datetime.now(UTC))
    content = f"{_header(lowered, 'webhook-id')}.{seconds}.".encode() + body
    given = _signatures(_header(lowered, "webhook-signature"))
    expected = [_digest(key, content) for key in _keys(secret)]
    # Every pair is compared, so that the time this takes tells nothing.
    matches = [hmac.compare_digest(one, other) for one in expected for other in given]
    if not any(matches):
        raise errors.WebhookVerificationFailed(reason="no signature fits the body and the secret")


def check_url(url: str, *, allow_http: bool = False, allowed_networks: tuple[Network, ...] = ()) -> str:
    """Return a callback's URL as it was given, if a callback may have it.

    A name is not resolved here: what it stands for is decided whenever it is dialled.

    Raises:
        InvalidWebhook: it is not an absolute https URL of a public host, or is written oddly.

    """
    if len(url) > MAX_URL_LENGTH:
        raise errors.InvalidWebhook(reason=f"is longer than {MAX_URL_LENGTH:,} characters")
    if not _URL_CHARACTERS.fullmatch(url):
        raise errors.InvalidWebhook(reason="has characters that a URL must write as %xx (or a host as xn--)")
    parts = _split(url)
    if parts.scheme != "https" and not (allow_http and parts.scheme == "http"):
        raise errors.InvalidWebhook(reason="must begin with https://")
    if "@" in parts.netloc:
        raise errors.InvalidWebhook(reason="must not carry a user name or a password")
    if "#" in url:
        raise errors.InvalidWebhook(reason="must not have a fragment ('#...')")
    address = _literal(_host(parts))
    if address is not None and not may_reach(address, allowed_networks):
        raise errors.InvalidWebhook(reason=f"{parts.hostname} is not a public address")
    return url


def _digest(key: bytes, content: bytes) -> bytes:
    return hmac.new(key, content, hashlib.sha256).digest()


def _keys(secret: str | Sequence[str]) -> list[bytes]:
    secrets = [secret] if isinstance(secret, str) else secret
    try:
        keys = [base64.b64decode(one.removeprefix(SECRET_PREFIX), validate=True) for one in secrets]
    except ValueError:
        keys = []
    if not keys or not all(keys):
        raise errors.InvalidInput(reason="a webhook secret is 'whsec_' and base64")
    return keys


def _header(headers: Mapping[str, str], name: str) -> str:
    value = headers.get(name)
    if not value:
        raise errors.WebhookVerificationFailed(reason=f"the header {name} is missing")
    return value


def _fresh_timestamp(text: str, tolerance: timedelta, now: datetime) -> int:
    if not re.fullmatch(r"[0-9]{1,12}", text):
        raise errors.WebhookVerificationFailed(reason="webhook-timestamp is not a number of seconds")
    seconds = int(text)
    if abs(now.timestamp() - seconds) > tolerance.total_seconds():
        raise errors.WebhookVerificationFailed(reason="webhook-timestamp is too far from the present")
    return seconds


def _signatures(header: str) -> list[bytes]:
    found: list[bytes] = []
    for part in header.split(" "):
        version, _, signature = part.partition(",")
        if version == "v1":
            try:
                found.append(base64.b64decode(signature, validate=True))
            except ValueError:
                continue  # a malformed part is one that does not fit
    return found


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise errors.InvalidWebhook(reason="has a malformed host or port") from None
    if port is not None and not 0 < port <= _MAX_PORT:
        raise errors.InvalidWebhook(reason=f"must have a port between 1 and {_MAX_PORT:,}")
    return parts


def _host(parts: SplitResult) -> str:
    host = parts.hostname
    if not host:
        raise errors.InvalidWebhook(reason="must name a host")
    if parse_address(host) is None and not _HOST_NAME.fullmatch(host):
        raise errors.InvalidWebhook(reason=f"{host} is not a host name")
    return host


def _literal(host: str) -> Address | None:
    """The address that a host's spelling already gives away, as resolvers read it (127.1, 2130706433)."""
    if host.rstrip(".") == "localhost" or host.rstrip(".").endswith(".localhost"):
        return parse_address("127.0.0.1")
    try:
        return parse_address(host) or parse_address(socket.inet_ntoa(socket.inet_aton(host.rstrip("."))))
    except OSError:
        return None
