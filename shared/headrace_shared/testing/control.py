"""What a simulated provider answers beside its four model endpoints: models, statistics, switches."""

import asyncio
import json
from collections.abc import Sequence
from typing import Protocol
from urllib.parse import unquote

from aiohttp import ClientSession, hdrs, web
from pydantic import JsonValue
from pydantic_core import from_json

from headrace_shared.errors import InvalidConfiguration
from headrace_shared.testing.behaviour import Behaviour, as_json, changed
from headrace_shared.testing.books import Books
from headrace_shared.testing.calls import Refusal, unknown_model


class Controlled(Protocol):
    """What the control endpoints read and change."""

    @property
    def books(self) -> Books: ...
    @property
    def behaviour(self) -> Behaviour: ...
    @property
    def peers(self) -> Sequence[str]: ...
    def behave(self, behaviour: Behaviour) -> None: ...
    def reset(self) -> None: ...


async def answer_control(provider: Controlled, request: web.BaseRequest, number: str) -> web.StreamResponse:
    """Answer anything but a call of a model.

    `GET /stats` gives the books, `POST /behaviour` changes the fields that its JSON object names,
    `POST /reset` empties the books; all three answer with the books, the sum over all processes.
    """
    headers = {"x-request-id": f"req_{number}"}
    match request.method, request.path:
        case (hdrs.METH_GET, "/stats") | (hdrs.METH_POST, "/behaviour" | "/reset"):
            answer = await _control(provider, request)
        case (hdrs.METH_GET, "/v1/models"):
            answer = {"object": "list", "data": [_model(model) for model in _MODELS]}
        case (hdrs.METH_GET, path) if path.startswith("/v1/models/"):
            model = unquote(path.removeprefix("/v1/models/"))
            answer = unknown_model(model) if model.startswith("missing-") else _model(model)
        case (method, path):
            answer = Refusal(404, f"Unknown request URL: {method} {path}.", code="unknown_url")
    if isinstance(answer, Refusal):
        return web.Response(status=answer.status, body=answer.body, content_type=_JSON, headers=headers)
    return web.Response(body=json.dumps(answer).encode(), content_type=_JSON, headers=headers)


_JSON = "application/json"
_MODELS = ("gpt-4o", "gpt-4o-mini", "text-embedding-3-small", "omni-moderation-latest")
_ONE = "x-simulated-one"
"""Marks a request that one process sends to another: it is not passed on."""


async def _control(provider: Controlled, request: web.BaseRequest) -> dict[str, JsonValue] | Refusal:
    changes = await request.content.read()
    if provider.peers and _ONE not in request.headers:
        return await _ask_all(provider.peers, request.method, request.path, changes)
    if request.path == "/behaviour":
        try:
            provider.behave(changed(provider.behaviour, changes))
        except InvalidConfiguration as error:
            return Refusal(400, str(error))
    elif request.path == "/reset":
        provider.reset()
    return {**provider.books.as_json(), "behaviour": as_json(provider.behaviour)}


async def _ask_all(
    peers: Sequence[str], method: str, path: str, changes: bytes
) -> dict[str, JsonValue] | Refusal:
    async with ClientSession() as session:

        async def ask(peer: str) -> JsonValue:
            async with session.request(method, peer + path, data=changes, headers={_ONE: "1"}) as response:
                document: JsonValue = from_json(await response.read())
                return document

        answers = await asyncio.gather(*(ask(peer) for peer in peers))
    merged = _merged("", answers)
    if not isinstance(merged, dict) or "error" in merged:
        return Refusal(400, "The changes were refused.")
    return merged


def _merged(name: str, values: Sequence[JsonValue]) -> JsonValue:
    """Return the sum of the books of several processes; their peaks are added up too."""
    tables = [value for value in values if isinstance(value, dict)]
    if tables and name != "behaviour":
        names = dict.fromkeys(key for table in tables for key in table)
        return {key: _merged(key, [table[key] for table in tables if key in table]) for key in names}
    numbers = [value for value in values if isinstance(value, int | float)]
    if numbers and name in {"first_at", "last_at"}:
        return min(numbers) if name == "first_at" else max(numbers)
    return sum(numbers) if numbers else values[0]


def _model(model: str) -> dict[str, JsonValue]:
    return {"id": model, "object": "model", "created": 1_700_000_000, "owned_by": "simulated"}
