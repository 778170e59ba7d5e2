"""One attempt of one callback: a signed POST, and what became of it."""

import asyncio
import re
import ssl
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Literal, Self

import httpcore2

from headrace_shared import errors, webhooks
from headrace_shared.networks import Network
from headrace_shared.store.deliveries import ClaimedDelivery
from headrace_workers.webhooks.guard import CONNECT_TIMEOUT, Guard, Resolver

ErrorClass = Literal["unreachable", "tls", "timeout", "broken", "redirect", "status", "internal"]
"""Why an attempt failed, as its tenant may know it.

``unreachable`` is all that is said of a refused address, an unknown name and a closed
port alike: the difference would let a tenant map the network that Headrace runs in.
"""

MAX_ANSWER_BYTES = 16 * 1024
SNIPPET_CHARACTERS = 500
USER_AGENT = "headrace/0.1"

_IDLE_SECONDS = 2.0  # less than the keep-alive of common servers, so that none closes under a request
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


@dataclass(frozen=True, slots=True)
class Delivered:
    """The receiver took it (2xx)."""

    status: int


@dataclass(frozen=True, slots=True)
class Failed:
    """It did not get through; there may be another attempt."""

    error_class: ErrorClass
    status: int | None = None
    retry_after: timedelta | None = None
    snippet: str | None = None
    """The beginning of the receiver's answer."""


@dataclass(frozen=True, slots=True)
class Gone:
    """The receiver wants no more of it (410)."""

    status: int = 410


Outcome = Delivered | Failed | Gone


class Sender:
    """Sends callbacks through the dial guard; an async context manager, because it keeps connections.

    Args:
        masters: the keys from which each tenant's signing secrets are derived: one, or two
            while receivers change over to the first.
        timeout: for a whole attempt, from the lookup to the last byte that is read.
        allowed_networks: private networks that callbacks may reach all the same.
        resolve: for tests; by default the system's resolver.

    Raises:
        InvalidConfiguration: a key is empty: anybody could sign with it.

    """

    def __init__(
        self,
        masters: tuple[bytes, ...],
        *,
        timeout: timedelta = timedelta(seconds=15),
        allow_http: bool = False,
        allowed_networks: tuple[Network, ...] = (),
        resolve: Resolver | None = None,
        max_connections: int = 200,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        if not masters or not all(masters):
            raise errors.InvalidConfiguration(where="webhooks.secret", reason="is empty")
        self._masters = masters
        self._timeout = timeout.total_seconds()
        self._allow_http = allow_http
        self._allowed_networks = allowed_networks
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=ssl_context,
            max_connections=max_connections,
            max_keepalive_connections=max_connections,
            keepalive_expiry=_IDLE_SECONDS,
            network_backend=Guard(allowed_networks=allowed_networks, resolve=resolve),
        )

    async def __aenter__(self) -> Self:
        await self._pool.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._pool.__aexit__(kind, error, traceback)

    async def send(self, delivery: ClaimedDelivery) -> Outcome:
        """Make one attempt; every way it can end is a value."""
        try:
            async with asyncio.timeout(self._timeout):
                return await self._post(delivery)
        except (TimeoutError, httpcore2.TimeoutException):
            return Failed("timeout")
        except (errors.WebhookRefused, errors.InvalidWebhook):
            return Failed("unreachable")
        except httpcore2.ConnectError as error:
            return Failed("tls" if isinstance(error.__context__, ssl.SSLError) else "unreachable")
        except (httpcore2.NetworkError, httpcore2.ProtocolError):
            return Failed("broken")

    async def _post(self, delivery: ClaimedDelivery) -> Outcome:
        url = webhooks.check_url(
            delivery.url, allow_http=self._allow_http, allowed_networks=self._allowed_networks
        )
        body = delivery.payload.encode()
        connect = min(CONNECT_TIMEOUT.total_seconds(), self._timeout)
        timeouts = {"connect": connect, "read": self._timeout, "write": self._timeout, "pool": self._timeout}
        async with self._pool.stream(
            "POST",
            url,
            headers=list(self._headers(delivery, body).items()),
            content=body,
            extensions={"timeout": timeouts},
        ) as response:
            snippet = await _read_snippet(response)
            return _judge(response, snippet)

    def _headers(self, delivery: ClaimedDelivery, body: bytes) -> dict[str, str]:
        webhook_id = f"evt_{delivery.id.hex}"
        secrets = [webhooks.tenant_secret(master, delivery.tenant) for master in self._masters]
        headers = {
            "accept-encoding": "identity",
            "content-type": "application/json",
            "user-agent": USER_AGENT,
            "headrace-attempt": str(delivery.attempt),
            "webhook-id": webhook_id,
            "webhook-timestamp": str(int(delivery.claimed_at.timestamp())),
            "webhook-signature": webhooks.sign(secrets, webhook_id, delivery.claimed_at, body),
        }
        if delivery.traceparent and _TRACEPARENT.fullmatch(delivery.traceparent):
            headers["traceparent"] = delivery.traceparent
        return headers


async def _read_snippet(response: httpcore2.Response) -> str:
    """Read at most 16 KiB: a short answer to its end, so that the connection can serve again."""
    answer = bytearray()
    async with aclosing(response.aiter_stream()) as chunks:
        async for chunk in chunks:
            answer += chunk[: MAX_ANSWER_BYTES - len(answer)]
            if len(answer) >= MAX_ANSWER_BYTES:
                break
    text = bytes(answer).decode(errors="replace").replace("\x00", "\ufffd")  # PostgreSQL keeps no NUL
    return text[:SNIPPET_CHARACTERS]


def _judge(response: httpcore2.Response, snippet: str) -> Outcome:
    match response.status:
        case status if 200 <= status < 300:  # noqa: PLR2004 - classes of HTTP
            return Delivered(status)
        case 410:
            return Gone()
        case status if 300 <= status < 400:  # noqa: PLR2004
            return Failed("redirect", status, snippet=snippet)
        case status:
            return Failed("status", status, _retry_after(response), snippet)


def _retry_after(response: httpcore2.Response) -> timedelta | None:
    """The receiver's wish: seconds, or a date, which is read against the receiver's own clock."""
    headers = {name.lower(): value.decode("latin-1") for name, value in response.headers}
    wish = headers.get(b"retry-after", "").strip()
    if re.fullmatch(r"[0-9]{1,9}", wish):
        return timedelta(seconds=int(wish))
    then, now = _http_date(wish), _http_date(headers.get(b"date", ""))
    return then - now if then and now and then > now else None


def _http_date(text: str) -> datetime | None:
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    return moment if moment.tzinfo else None
