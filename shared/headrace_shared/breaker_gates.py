"""The gates of breakers, which keep the queues of a target back; and breakers by an operator's hand."""

from datetime import timedelta
from urllib.parse import quote

from headrace_shared.configuration import Configuration
from headrace_shared.dispatch import breakers
from headrace_shared.dispatch.dispatch import Dispatch, Gate, GateReason
from headrace_shared.ids import RouteName
from headrace_shared.routes import Target


def gate_of(route: RouteName) -> Gate:
    return Gate(f"route:{quote(route, safe='')}", GateReason.BREAKER)


def gates_of(configuration: Configuration, target: Target) -> list[Gate]:
    """Return the gates of the routes that nobody answers while this target is down."""
    named = [
        RouteName(name) for name in configuration.routes if configuration.resolve_route(name).needs(target)
    ]
    direct = target.provider == configuration.defaults.provider and target.model not in configuration.routes
    return [gate_of(route) for route in ([*named, RouteName(target.model)] if direct else named)]


async def hold_open(
    dispatch: Dispatch, configuration: Configuration, target: Target, duration: timedelta | None
) -> None:
    """Open a breaker by hand, for a time or until it is closed by hand, and keep its queues back."""
    await breakers.hold_open(dispatch.redis, target, duration)
    for gate in gates_of(configuration, target):
        await dispatch.close_gate(gate, duration)


async def release(dispatch: Dispatch, configuration: Configuration, target: Target) -> bool:
    """Close a breaker by hand, and let its queues go on; false when it was not open."""
    was_open = (await breakers.view(dispatch.redis, target)).is_open
    if was_open:
        await breakers.close(dispatch.redis, target, None)
    for gate in gates_of(configuration, target):
        await dispatch.open_gate(gate)
    return was_open
