"""The handlers of a worker, found by the names of their modules."""

import importlib
import os
import sys
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from headrace_shared.errors import HeadraceError, InvalidHandler
from headrace_shared.handlers import HandlerEndpoint, HandlerName, handler_endpoint, handler_lane, handler_of
from headrace_shared.ids import Lane
from headrace_shared.request import Endpoint
from headrace_shared.store.claims import Abilities
from headrace_workers.handlers.dependencies import Dependencies
from headrace_workers.handlers.registry import Handler, Registered


@dataclass(frozen=True, slots=True)
class Handlers:
    """The handlers of one worker, and what each of them is given."""

    by_name: Mapping[HandlerName, Handler] = field(default_factory=dict[HandlerName, Handler])
    given: Mapping[HandlerName, Mapping[str, object]] = field(
        default_factory=dict[HandlerName, Mapping[str, object]]
    )

    @property
    def endpoints(self) -> tuple[HandlerEndpoint, ...]:
        return tuple(handler_endpoint(name) for name in self.by_name)

    @property
    def abilities(self) -> Abilities:
        return Abilities(endpoints=(*Endpoint, *self.endpoints))

    def of(self, endpoint: Endpoint | HandlerEndpoint) -> Handler | None:
        name = handler_of(endpoint)
        return None if name is None else self.by_name.get(name)

    def lanes(self, lanes: Iterable[Lane]) -> list[tuple[Lane, Lane]]:
        """Return the lanes of these handlers' jobs, each with the one it belongs to."""
        return [(handler_lane(lane, name), lane) for lane in lanes for name in self.by_name]


NO_HANDLERS = Handlers()


@asynccontextmanager
async def open_handlers(places: Sequence[str]) -> AsyncGenerator[Handlers]:
    """Load handlers and make what they depend on; it is closed in the opposite order.

    Args:
        places: `module`, for all handlers that it has, or `module:attribute` for one of them.

    Raises:
        InvalidHandler: names the place and what is wrong there.

    """
    by_name = load_handlers(places)
    async with AsyncExitStack() as stack:
        dependencies = Dependencies(stack)
        given = {
            name: await dependencies.open(f"handler {name!r}", one.dependencies)
            for name, one in by_name.items()
        }
        yield Handlers(by_name, given)


def load_handlers(places: Sequence[str]) -> Mapping[HandlerName, Handler]:
    """Import modules, from the present directory as well, and return the handlers in them.

    Raises:
        InvalidHandler: names the place and what is wrong there.

    """
    found: dict[HandlerName, tuple[str, Handler]] = {}
    for place in places:
        for handler in _handlers_at(place):
            other, known = found.setdefault(handler.name, (place, handler))
            if known is not handler:
                reason = f"the name {handler.name!r} is used twice, here and in {other}"
                raise InvalidHandler(where=place, reason=reason)
    return {name: handler for name, (_, handler) in found.items()}


def _handlers_at(place: str) -> list[Handler]:
    module, _, attribute = place.partition(":")
    content = _import(place, module)
    if not attribute:
        handlers = [one.handler for one in content.values() if isinstance(one, Registered)]
        if not handlers:
            raise InvalidHandler(where=place, reason="has no handler (a function with @handler)")
        return handlers
    if attribute not in content:
        raise InvalidHandler(where=place, reason=f"the module {module} has no {attribute}")
    named = content[attribute]
    if not isinstance(named, Registered):
        raise InvalidHandler(where=place, reason="is no handler (a function with @handler)")
    return [named.handler]


def _import(place: str, module: str) -> Mapping[str, object]:
    if not all(part.isidentifier() for part in module.split(".")):
        raise InvalidHandler(where=f"handlers {place!r:.80}", reason="must be module or module:attribute")
    # A command has its own folder on the path, not the one it is started in.
    if (here := os.getcwd()) not in sys.path:  # noqa: PTH109 - as the path has it
        sys.path.insert(0, here)
    try:
        return vars(importlib.import_module(module))
    except HeadraceError:
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            raise InvalidHandler(where=place, reason=f"there is no module {error.name}") from None
        raise InvalidHandler(where=place, reason=f"cannot be imported ({error})") from error
    except Exception as error:
        reason = f"cannot be imported ({type(error).__name__}: {error})"
        raise InvalidHandler(where=place, reason=reason) from error
