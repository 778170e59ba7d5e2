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
    price: Price
    request: PreparedRequest
    most: NanoUSD


def request_for(now: Snapshot, ask: Ask, price: Price) -> PreparedRequest:
    """Make a call's request ready for the target that has this price.

    Raises:
        InvalidRequest: it was never checked, and is wrong.

    """
    default = now.configuration.defaults.max_output_tokens
    return prepare(
        ask.body, ask.endpoint, price.target.model, default, price.vocabulary, known=ask.bounds_known
    )


def offer_of(now: Snapshot, ask: Ask, target: Target) -> Offer | None:
    """Return what a call asks of a target; None where nobody knows, or it is no request."""
    try:
        price = now.prices.price(target)
        request = request_for(now, ask, price)
        most = price.worst_case(request.input_bound, request.output_bound, request.hosted)
    except (UnknownPrice, InvalidRequest):
        return None
    return Offer(price, request, most)


def most_cost(now: Snapshot, ask: Ask, target: Target) -> NanoUSD | None:
    """Return the most that a call costs at a target, if anybody knows."""
    offer = offer_of(now, ask, target)
    return None if offer is None else offer.most
