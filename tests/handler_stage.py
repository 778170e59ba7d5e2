"""Handlers that a test defines where it needs them, found by a worker as an application's are."""

import sys
from types import ModuleType
from uuid import uuid4

import pytest
from pydantic import BaseModel

from headrace_workers.handlers.registry import Registered

CHAT = "/v1/chat/completions"
QUICK: dict[str, object] = {"retries": {"initial": "10ms", "maximum": "20ms"}}


class Document(BaseModel):
    text: str = "A mill stands by the river."


class Summary(BaseModel):
    text: str


def question(text: str = "Hi", *, model: str = "gpt-4o-mini") -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": text}]}


class Application:
    """What `handlers=` of a worker names: a module with the handlers that were put into it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._module = ModuleType(f"application_{uuid4().hex}")
        monkeypatch.setitem(sys.modules, self._module.__name__, self._module)

    def with_handlers(self, *handlers: Registered) -> tuple[str, ...]:
        for number, one in enumerate(handlers):
            setattr(self._module, f"handler_{number}", one)
        return (self._module.__name__,)
