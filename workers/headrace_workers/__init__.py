"""Everything that runs jobs.

`headrace worker` starts a worker; so does ``arq headrace_workers.WorkerSettings``. An application's
own functions become handlers with `handler`, and work with a `Context`.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headrace_workers.handlers.answers import Answer
    from headrace_workers.handlers.context import Context
    from headrace_workers.handlers.dependencies import Depends
    from headrace_workers.handlers.registry import handler

__all__ = ["Answer", "Context", "Depends", "WorkerSettings", "handler"]

WorkerSettings: Mapping[str, object]
"""What arq's command line takes; read from the environment when it is asked for."""

_HANDLERS = {
    "Answer": "headrace_workers.handlers.answers",
    "Context": "headrace_workers.handlers.context",
    "Depends": "headrace_workers.handlers.dependencies",
    "handler": "headrace_workers.handlers.registry",
}
"""Loaded when they are asked for: the command line of `headrace` needs none of them."""


def __getattr__(name: str) -> object:
    if name == "WorkerSettings":
        from headrace_workers.arq_settings import worker_settings  # noqa: PLC0415 - only arq's command needs it

        return worker_settings()
    if name in _HANDLERS:
        return getattr(import_module(_HANDLERS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
