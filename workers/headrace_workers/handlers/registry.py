"""What an application registers with `@handler`, checked once."""

import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import update_wrapper
from typing import Concatenate, Generic, ParamSpec, TypeVar

from pydantic import BaseModel

from headrace_shared.errors import InvalidHandler
from headrace_shared.handlers import HandlerName, parse_handler_name
from headrace_workers.handlers.context import Context
from headrace_workers.handlers.dependencies import Factory, dependencies_of, signature_of

P = ParamSpec("P")
In = TypeVar("In", bound=BaseModel)
Out = TypeVar("Out", bound=BaseModel)

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True, slots=True)
class Handler:
    """A function as a worker knows it."""

    name: HandlerName
    function: Callable[..., Awaitable[object]]
    """Takes a Context, its input, and the dependencies by their names."""
    input: type[BaseModel]
    output: type[BaseModel]
    timeout: timedelta | None
    dependencies: Mapping[str, Factory]
    """What makes each further argument, by its name."""


class Registered:
    """What a worker looks for in an application's modules."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler


class HandlerFunction(Registered, Generic[In, P, Out]):
    """A registered function; it can be called like any other, as a test of the application does."""

    def __init__(
        self, function: Callable[Concatenate[Context, In, P], Awaitable[Out]], handler: Handler
    ) -> None:
        super().__init__(handler)
        self._function = function
        update_wrapper(self, function)

    def __call__(self, ctx: Context, given: In, /, *args: P.args, **kwargs: P.kwargs) -> Awaitable[Out]:
        return self._function(ctx, given, *args, **kwargs)


def handler(
    name: str, *, timeout: timedelta | None = None
) -> Callable[[Callable[Concatenate[Context, In, P], Awaitable[Out]]], HandlerFunction[In, P, Out]]:
    """Register an async function as the handler of the jobs that are enqueued under a name.

    ::

        @handler("summarise", timeout=timedelta(minutes=5))
        async def summarise(
            ctx: Context, document: Document, http: Annotated[Client, Depends(open_client)]
        ) -> Summary: ...

    Args:
        name: 1 to 64 lower-case letters, digits, dots, dashes and underscores.
        timeout: how long one run may take; one that takes longer is cancelled, and tried again.

    Raises:
        InvalidHandler: says what is wrong with the name or the function.

    """

    def register(
        function: Callable[Concatenate[Context, In, P], Awaitable[Out]],
    ) -> HandlerFunction[In, P, Out]:
        return HandlerFunction(function, _checked(name, function, timeout))

    return register


def _checked(name: str, function: Callable[..., Awaitable[object]], timeout: timedelta | None) -> Handler:
    where = f"handler {name!r:.80}"
    known = parse_handler_name(name)
    if known is None:
        raise InvalidHandler(
            where=where,
            reason="a name is 1 to 64 lower-case letters, digits, dots, dashes and underscores",
        )
    if not inspect.iscoroutinefunction(function):
        raise InvalidHandler(where=where, reason="must be an async function")
    if timeout is not None and timeout <= timedelta(0):
        raise InvalidHandler(where=where, reason="its timeout must be longer than nothing")
    signature = signature_of(where, function)
    leading, further = list(signature.parameters.values())[:2], list(signature.parameters.values())[2:]
    if len(leading) != 2 or any(one.kind not in _POSITIONAL for one in leading):  # noqa: PLR2004
        raise InvalidHandler(where=where, reason="must take a Context and its input as its first parameters")
    return Handler(
        known,
        function,
        _model(where, "its input", leading[1].annotation),
        _model(where, "its result", signature.return_annotation),
        timeout,
        dependencies_of(where, further),
    )


def _model(where: str, what: str, annotation: object) -> type[BaseModel]:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return annotation
    raise InvalidHandler(where=where, reason=f"{what} must be annotated as a pydantic model")
