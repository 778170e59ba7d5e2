"""What a target asks for a call: its price, the request as it goes there, and the most that can cost."""

from dataclasses import dataclass

from headrace_shared.errors import InvalidRequest, UnknownPrice
from headrace_shared.money import NanoUSD
from headrace_shared.prices import Price
from headrace_shared.request import PreparedRequest, prepare
from headrace_shared.routes import Target
from headrace_workers.configured import Snapshot
from headrace_workers.execution import Ask


@dataclass(frozen=True, slots=True)
class Offer:
    target: Target
    price: Price
    request: PreparedRequest
    most: NanoUSD


def offer_of(now: Snapshot, ask: Ask, target: Target) -> Offer | None:
    """Return what a call asks of a target; None where nobody knows, or it is no request."""
    try:
        price = now.prices.price(target)
        default = now.configuration.defaults.max_output_tokens
        request = prepare(
            ask.body, ask.endpoint, target.model, default, price.vocabulary, known=ask.bounds_known
        )
        most = price.worst_case(request.input_bound, request.output_bound, request.hosted)
    except (UnknownPrice, InvalidRequest):
        return None
    return Offer(target, price, request, most)


def most_cost(now: Snapshot, ask: Ask, target: Target) -> NanoUSD | None:
    """Return the most that a call costs at a target, if anybody knows."""
    offer = offer_of(now, ask, target)
    return None if offer is None else offer.most
