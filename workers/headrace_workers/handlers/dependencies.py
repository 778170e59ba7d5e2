"""What handlers are given beside their input: made once for the life of a worker.

The convention is FastAPI's: a parameter that is annotated `Annotated[Client, Depends(open_client)]`
gets what `open_client` makes. A factory may be a function, an async function, or a generator of
either kind, whose rest runs when the worker ends; its own parameters may depend on others.
"""

import inspect
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Annotated, TypeGuard, get_args, get_origin

from headrace_shared.errors import InvalidHandler

Factory = Callable[..., object]


@dataclass(frozen=True, slots=True)
class Depends:
    """Says what makes the value of a parameter."""

    factory: Factory


class Dependencies:
    """The values that were made, one for each factory."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self._made: dict[Factory, object] = {}

    async def open(self, where: str, wanted: Mapping[str, Factory]) -> Mapping[str, object]:
        """Make what is wanted and was not made yet; it is closed with the stack, the last one first.

        Raises:
            InvalidHandler: a factory failed, or cannot be called.

        """
        return {name: await self._value(where, factory, ()) for name, factory in wanted.items()}

    async def _value(self, where: str, factory: Factory, above: Sequence[Factory]) -> object:
        if factory in self._made:
            return self._made[factory]
        named = f"{where}, dependency {name_of(factory)}"
        if factory in above:
            raise InvalidHandler(where=named, reason="depends on itself")
        needed = dependencies_of(named, list(signature_of(named, factory).parameters.values()))
        arguments = {
            name: await self._value(named, other, (*above, factory)) for name, other in needed.items()
        }
        try:
            self._made[factory] = await self._make(factory, arguments)
        except InvalidHandler:
            raise
        except Exception as error:
            raise InvalidHandler(where=named, reason=f"failed ({type(error).__name__}: {error})") from error
        return self._made[factory]

    async def _make(self, factory: Factory, arguments: Mapping[str, object]) -> object:
        if _is_async_generator(factory):
            return await self._stack.enter_async_context(asynccontextmanager(factory)(**arguments))
        if _is_generator(factory):
            return self._stack.enter_context(contextmanager(factory)(**arguments))
        made = factory(**arguments)
        return await made if inspect.isawaitable(made) else made


def _is_async_generator(factory: Factory) -> TypeGuard[Callable[..., AsyncGenerator[object, None]]]:
    return inspect.isasyncgenfunction(factory)


def _is_generator(factory: Factory) -> TypeGuard[Callable[..., Generator[object, None, None]]]:
    return inspect.isgeneratorfunction(factory)


def dependencies_of(where: str, parameters: Sequence[inspect.Parameter]) -> Mapping[str, Factory]:
    """Return what makes each parameter; one with a default may be without.

    Raises:
        InvalidHandler: nothing says what a parameter is to be given.

    """
    found: dict[str, Factory] = {}
    for parameter in parameters:
        factory = _factory_of(parameter.annotation)
        if factory is not None and parameter.kind is not inspect.Parameter.POSITIONAL_ONLY:
            found[parameter.name] = factory
        elif parameter.default is inspect.Parameter.empty:
            reason = f"nothing says what {parameter.name} is given: annotate it with Depends(...)"
            raise InvalidHandler(where=where, reason=reason)
    return found


def _factory_of(annotation: object) -> Factory | None:
    if get_origin(annotation) is not Annotated:
        return None
    return next((one.factory for one in get_args(annotation)[1:] if isinstance(one, Depends)), None)


def signature_of(where: str, function: Callable[..., object]) -> inspect.Signature:
    """Return a signature, with annotations that are written as text read.

    Raises:
        InvalidHandler: an annotation names what is not there.

    """
    try:
        return inspect.signature(function, eval_str=True)
    except (NameError, TypeError, ValueError, SyntaxError, AttributeError) as error:
        raise InvalidHandler(where=where, reason=f"its annotations cannot be read ({error})") from None


def name_of(function: Callable[..., object]) -> str:
    return getattr(function, "__qualname__", repr(function))
