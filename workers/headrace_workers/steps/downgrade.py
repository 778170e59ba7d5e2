"""The other targets of a route, for a call that its budget has no room for."""

from collections.abc import Iterator
from dataclasses import replace

from headrace_shared.errors import InvalidRequest, UnknownPrice
from headrace_shared.money import NanoUSD
from headrace_shared.request import prepare
from headrace_workers.configured import Configured
from headrace_workers.execution import Run


def cheaper(configured: Configured, run: Run, than: NanoUSD) -> Iterator[tuple[Run, NanoUSD]]:
    """Return a run as the other targets of its route, and its fallbacks, would answer it, in their order.

    Only those come that are known to cost less at most, each with what that is.
    """
    if run.ask is None:
        return
    now = configured.now
    most_tokens = now.configuration.defaults.max_output_tokens
    for target in now.configuration.resolve_route(run.ask.route).all_targets:
        if target == run.target:
            continue
        try:
            price = now.prices.price(target)
            request = prepare(run.ask.body, run.ask.endpoint, target.model, most_tokens)
            most = price.worst_case(request.input_bound, request.output_bound)
        except (UnknownPrice, InvalidRequest):
            continue
        if most < than:
            yield replace(run, target=target, price=price, request=request), most
