"""The names of an application's own handlers, where a job's endpoint and its lane carry them.

A job whose endpoint is `handler:summarise` is run by the function of that name. It waits in a lane
of its own, `default@summarise`, which only workers that have this handler serve: a worker without
it, or of a version that knows no handlers, never sees the job.
"""

import re
from typing import NewType

from headrace_shared.ids import Lane
from headrace_shared.request_bounds import Endpoint

HandlerName = NewType("HandlerName", str)
HandlerEndpoint = NewType("HandlerEndpoint", str)
"""`handler:NAME`."""

_SCHEME = "handler:"
_NAME = re.compile(r"[a-z0-9._-]{1,64}")


def parse_handler_name(text: str) -> HandlerName | None:
    """Read a handler's name; None for what is not one."""
    return HandlerName(text) if _NAME.fullmatch(text) else None


def handler_endpoint(name: HandlerName) -> HandlerEndpoint:
    return HandlerEndpoint(_SCHEME + name)


def handler_lane(lane: Lane, name: HandlerName) -> Lane:
    """Return where the jobs of a handler wait that were put into `lane`."""
    return Lane(f"{lane}@{name}")


def public_lane(lane: Lane) -> Lane:
    """Return the lane that a job was put into, without the handler's part."""
    return Lane(lane.partition("@")[0])


def handler_of(endpoint: Endpoint | HandlerEndpoint) -> HandlerName | None:
    """Return whose job it is; None for one that is a request itself."""
    return None if isinstance(endpoint, Endpoint) else HandlerName(endpoint.removeprefix(_SCHEME))


def read_endpoint(text: str) -> Endpoint | HandlerEndpoint:
    """Read what a row has as its endpoint.

    Raises:
        ValueError: it is neither a path that is known nor a handler's.

    """
    return HandlerEndpoint(text) if text.startswith(_SCHEME) else Endpoint(text)
