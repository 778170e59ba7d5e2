"""Calls to providers, over the `openai` SDK's cheapest public path: bytes in, bytes out.

One client per provider for the life of the process. The SDK does not retry: one layer
does. What comes back is a value of `Reply`.
"""

import asyncio
import contextlib
import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from urllib.parse import parse_qsl

import aiohttp
import httpx2
import openai
from openai import AsyncOpenAI, DefaultAioHttpClient, Omit, RequestOptions
from pydantic import BaseModel, ValidationError

from headrace_shared.jsonvalue import storable
from headrace_shared.outcome import ErrorClass, Failure
from headrace_shared.policy import Timeouts
from headrace_shared.request import Endpoint
from headrace_shared.routes import Provider
from headrace_shared.usage import Finish, ParsedAnswer, read_answer
from headrace_workers.replies import Answered, Refused, Reply, Unknown

_JSON = {"Content-Type": "application/json"}
MAX_ANSWER_BYTES = 256 * 1024 * 1024
"""What one answer may be to be kept."""

_MAX_REFUSAL_BYTES = 64 * 1024
_MESSAGE_LENGTH = 500

_BY_CODE = {
    "insufficient_quota": ErrorClass.QUOTA_EXHAUSTED,
    "billing_hard_limit_reached": ErrorClass.QUOTA_EXHAUSTED,
    "billing_not_active": ErrorClass.QUOTA_EXHAUSTED,
    "context_length_exceeded": ErrorClass.CONTEXT_TOO_LONG,
    "exceed_context_size_error": ErrorClass.CONTEXT_TOO_LONG,
    "content_filter": ErrorClass.CONTENT_FILTER,
    "content_policy_violation": ErrorClass.CONTENT_FILTER,
    "moderation_blocked": ErrorClass.CONTENT_FILTER,
}
# Servers of open models have no code of their own for it, but the same words.
_TOO_LONG = re.compile(r"maximum context length|exceeds? the (model's |available )?context", re.IGNORECASE)
_BY_STATUS: dict[int, ErrorClass] = {
    HTTPStatus.UNAUTHORIZED: ErrorClass.AUTH,
    HTTPStatus.FORBIDDEN: ErrorClass.AUTH,
    HTTPStatus.REQUEST_TIMEOUT: ErrorClass.TIMEOUT,
    HTTPStatus.GATEWAY_TIMEOUT: ErrorClass.TIMEOUT,
    HTTPStatus.CONFLICT: ErrorClass.TRANSIENT,
    HTTPStatus.TOO_MANY_REQUESTS: ErrorClass.RATE_LIMITED,
}


class _Client(AsyncOpenAI):
    """The SDK's client; it puts its unchanging headers together once, not for each call."""

    _headers: dict[str, str | Omit] | None = None

    @property
    def default_headers(self) -> dict[str, str | Omit]:
        if self._headers is None:
            self._headers = super().default_headers
        return dict(self._headers)


class ProviderClient:
    """One provider's connections and key."""

    def __init__(self, provider: Provider, *, connections: int) -> None:
        self._timeouts = provider.timeouts
        timeout = _timeout(provider.timeouts)
        limits = httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)
        address, _, query = provider.base_url.partition("?")
        key = provider.api_key.resolve().reveal()
        headers = provider.resolve_headers()
        self._headers: dict[str, str | Omit] = dict(_JSON)
        if provider.key_header is not None:
            headers[provider.key_header] = key
            # The same key as a bearer token is another credential, which such a provider refuses.
            self._headers["Authorization"] = Omit()
        self._client = _Client(
            base_url=address,
            # The SDK wants a key even where the provider wants none.
            api_key=key or "none",
            default_headers=headers,
            default_query=dict(parse_qsl(query, keep_blank_values=True)),
            max_retries=0,
            timeout=timeout,
            # A redirect would carry the prompt, and headers that are secret, to another host.
            http_client=DefaultAioHttpClient(timeout=timeout, limits=limits, follow_redirects=False),
        )

    async def call(self, endpoint: Endpoint, body: bytes, timeouts: Timeouts | None = None) -> Reply:
        """Send a request and say what it came to; only cancellation is raised.

        Args:
            endpoint: what is called.
            body: the request.
            timeouts: where they are not the provider's own.

        """
        started = time.monotonic()
        total = (timeouts or self._timeouts).total.total_seconds()
        options: RequestOptions = {"headers": self._headers, "idempotency_key": ""}
        if timeouts is not None:
            options["timeout"] = _timeout(timeouts)
        try:
            async with asyncio.timeout(total):
                response = await self._client.post(
                    endpoint.removeprefix("/v1"),
                    content=body,
                    cast_to=httpx2.Response,
                    # Without a key the SDK makes one for each call and sends it nowhere.
                    options=options,
                )
        except TimeoutError:
            failure = Failure(ErrorClass.TIMEOUT, f"no answer within {total:g} s")
            return Unknown(_since(started), failure)
        except openai.APIStatusError as error:
            return _refused(_since(started), error.response)
        except (openai.APIConnectionError, httpx2.HTTPError, aiohttp.ClientError, OSError) as error:
            return _broken(_since(started), error)
        return _answered(_since(started), endpoint, response)

    async def close(self) -> None:
        await self._client.close()


def _timeout(timeouts: Timeouts) -> httpx2.Timeout:
    connect, read, total = (
        each.total_seconds() for each in (timeouts.connect, timeouts.read, timeouts.total)
    )
    return httpx2.Timeout(read, connect=connect, pool=total)


def _since(started: float) -> timedelta:
    return timedelta(seconds=time.monotonic() - started)


def _answered(latency: timedelta, endpoint: Endpoint, response: httpx2.Response) -> Reply:
    request_id = response.headers.get("x-request-id")
    if len(response.content) > MAX_ANSWER_BYTES:
        failure = Failure(ErrorClass.UNREADABLE, f"the answer is larger than {MAX_ANSWER_BYTES:,} bytes")
        return Unknown(latency, failure, response.status_code, request_id)
    parsed = read_answer(endpoint, response.content)
    if parsed is None or parsed.usage is None:
        failure = Failure(ErrorClass.UNREADABLE, "the provider's answer could not be read")
        return Unknown(latency, failure, response.status_code, request_id)
    return Answered(
        latency,
        response.status_code,
        request_id,
        response.content,
        parsed.usage,
        parsed.finish,
        _failure_of(parsed),
        _limit_headers(response.headers),
    )


def _limit_headers(headers: httpx2.Headers) -> Mapping[str, str]:
    # In one pass: a look-up by name goes through all of them.
    return {
        name.lower().decode("latin-1"): value.decode("latin-1")
        for name, value in headers.raw
        if name[:12].lower() == b"x-ratelimit-"
    }


def _failure_of(parsed: ParsedAnswer) -> Failure | None:
    match parsed.finish:
        case Finish.CONTENT_FILTER:
            return Failure(ErrorClass.CONTENT_FILTER, "the provider's content filter cut the answer")
        case Finish.FAILED:
            by_code = _BY_CODE.get(parsed.detail.partition(":")[0], ErrorClass.TRANSIENT)
            return Failure(by_code, storable(parsed.detail[:_MESSAGE_LENGTH]) or "the response failed")
        case Finish.COMPLETE | Finish.LENGTH:
            return None


def _refused(latency: timedelta, response: httpx2.Response) -> Refused:
    code, message = _error_of(response.content)
    failure = Failure(
        classify(response.status_code, code, message),
        f"{response.status_code}: {message}"[:_MESSAGE_LENGTH],
        retry_after(response.headers),
    )
    request_id = response.headers.get("x-request-id")
    body = response.content[:_MAX_REFUSAL_BYTES]
    return Refused(latency, failure, response.status_code, request_id, body, _limit_headers(response.headers))


def classify(status: int, code: str, message: str = "") -> ErrorClass:
    """Say what a refusal means, from its status and the `code` or `type` of its error, and its words."""
    if (by_code := _BY_CODE.get(code)) is not None:
        return by_code
    if status == HTTPStatus.BAD_REQUEST and _TOO_LONG.search(message):
        return ErrorClass.CONTEXT_TOO_LONG
    if (by_status := _BY_STATUS.get(status)) is not None:
        return by_status
    return ErrorClass.TRANSIENT if status >= HTTPStatus.INTERNAL_SERVER_ERROR else ErrorClass.BAD_REQUEST


class _Error(BaseModel):
    code: str | int | None = None
    type: str | None = None
    message: str | None = None


class _ErrorBody(BaseModel):
    error: _Error


def _error_of(body: bytes) -> tuple[str, str]:
    try:
        error = _ErrorBody.model_validate_json(body).error
    except ValidationError:
        return "", "the provider gave no reason that can be read"
    code = str(error.type if error.type in _BY_CODE else error.code or error.type or "")
    return code, storable(error.message or code)


def retry_after(headers: Mapping[str, str]) -> timedelta | None:
    """Read `retry-after-ms`, or `Retry-After` in seconds or as a date; nonsense counts as absent."""
    for name, read in (("retry-after-ms", _milliseconds), ("retry-after", _seconds_or_date)):
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            wait = read(headers.get(name, ""))
            if wait > timedelta(0):
                return wait
    return None


def _milliseconds(text: str) -> timedelta:
    return timedelta(milliseconds=float(text))


def _seconds_or_date(text: str) -> timedelta:
    try:
        return timedelta(seconds=float(text))
    except ValueError:
        moment = parsedate_to_datetime(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - datetime.now(UTC)


def _broken(latency: timedelta, error: BaseException) -> Reply:
    cause: BaseException | None = error
    while cause is not None:
        # Nothing was sent on a connection that never came to be; of anything else nobody knows.
        if isinstance(cause, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
            return Refused(latency, Failure(ErrorClass.TRANSIENT, "the provider cannot be reached"))
        if isinstance(cause, TimeoutError):
            return Unknown(latency, Failure(ErrorClass.TIMEOUT, "the provider stopped answering"))
        cause = cause.__cause__
    return Unknown(latency, Failure(ErrorClass.TRANSIENT, "the connection broke while the call was out"))
