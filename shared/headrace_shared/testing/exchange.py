"""One request and its answer on the wire of the simulated provider, booked as it goes out."""

import asyncio
import contextlib
import math
from collections.abc import Mapping
from datetime import timedelta

from aiohttp import web

from headrace_shared.testing.answers import Answer
from headrace_shared.testing.behaviour import Fate
from headrace_shared.testing.books import UNKNOWN_MODEL, Books, Request
from headrace_shared.testing.calls import Call, Endpoint, Refusal, hash_of
from headrace_shared.testing.limits import Standing


class Exchange:
    """One request to a model endpoint, answered and booked exactly once."""

    def __init__(self, books: Books, endpoint: Endpoint, request: web.BaseRequest, number: str) -> None:
        self.number = number
        self._books = books
        self._endpoint = endpoint
        self._request = request
        self._call: Call | None = None
        self._headers = {"x-request-id": f"req_{number}", "openai-processing-ms": "1", **_HEADERS}

    def accept(self, call: Call, headers: Mapping[str, str], latency: float) -> None:
        """Take note of what was asked, and of what every answer to it says in its headers."""
        self._call = call
        self._headers.update(headers)
        if latency:
            self._headers["openai-processing-ms"] = str(math.ceil(latency * 1000))

    def refuse(self, refusal: Refusal) -> web.StreamResponse:
        self._book(refusal.status, None)
        return web.Response(status=refusal.status, body=refusal.body, headers=self._headers)

    def limit(self, standing: Standing, pause: timedelta | None) -> web.StreamResponse:
        """Answer 429; without a pause of its own it names the time until there is room."""
        seconds = standing.wait if pause is None else pause.total_seconds()
        if seconds > 0:
            self._headers["retry-after"] = str(math.ceil(seconds))
            self._headers["retry-after-ms"] = str(math.ceil(seconds * 1000))
        kind = standing.exceeded or "requests"
        message = f"Rate limit reached for {kind} (simulated)."
        return self.refuse(Refusal(429, message, type=kind, code="rate_limit_exceeded"))

    async def send(self, made: Answer, fate: Fate, latency: float) -> web.StreamResponse:
        try:
            if latency:
                await asyncio.sleep(latency)
            if fate is Fate.HUNG:
                await asyncio.Event().wait()  # until the caller leaves or the provider closes
        except asyncio.CancelledError:
            # What was generated is billed: a caller that leaves meanwhile has not paid less.
            self._book(None, made)
            raise
        self._book(200, made, answered=fate is Fate.ANSWERED)
        if fate is Fate.CUT:
            return await self._cut(made.body)
        if fate is Fate.GARBLED:
            return self._garble(made.body)
        return web.Response(body=made.body, headers=self._headers)

    async def stream(
        self, made: Answer, events: list[bytes], fate: Fate, latency: float
    ) -> web.StreamResponse:
        """Send the events: half of the latency before the first, the other half between them."""
        response = web.StreamResponse(
            headers={**self._headers, "content-type": "text/event-stream; charset=utf-8"}
        )
        sent = events if fate is Fate.ANSWERED else events[: len(events) // 2]
        try:
            if latency:
                await asyncio.sleep(latency / 2)
            await response.prepare(self._request)
            for event in sent[:-1]:
                await response.write(event)
                if latency:
                    await asyncio.sleep(latency / 2 / len(events))
        except asyncio.CancelledError:
            self._book(None, made)
            raise
        except ConnectionError:
            self._book(None, made)
            return response
        # Booked before the last event is on its way: who has read the end finds it in the books.
        self._book(200, made, answered=fate is Fate.ANSWERED)
        with contextlib.suppress(ConnectionError):
            await response.write(b"data: {not json\n\n" if fate is Fate.GARBLED else sent[-1])
        if fate is Fate.CUT:
            self._drop()
        return response

    async def _cut(self, body: bytes) -> web.StreamResponse:
        response = web.StreamResponse(headers={**self._headers, "content-length": str(len(body))})
        with contextlib.suppress(ConnectionError):
            await response.prepare(self._request)
            await response.write(body[: len(body) // 2])
        self._drop()
        return response

    def _drop(self) -> None:
        if self._request.transport is not None:
            self._request.transport.close()

    def _garble(self, body: bytes) -> web.StreamResponse:
        return web.Response(body=body[: len(body) // 2], headers=self._headers)

    def _book(self, status: int | None, made: Answer | None, *, answered: bool = False) -> None:
        call = self._call
        self._books.book(
            Request(
                id=f"req_{self.number}",
                model=UNKNOWN_MODEL if call is None else call.model,
                endpoint=self._endpoint,
                prompt_hash="" if call is None else hash_of(call.prompt).hex(),
                status=status,
                answered=answered,
                usage=None if made is None else made.usage,
                hosted=None if call is None else call.hosted,
            )
        )


_HEADERS = {
    "content-type": "application/json",
    "openai-organization": "simulated",
    "openai-version": "2020-10-01",
}
