"""What a simulated provider would charge: its own books, priced."""

from collections.abc import Iterable

from headrace_shared.configuration import Configuration
from headrace_shared.money import NanoUSD
from headrace_shared.prices import PriceBook
from headrace_shared.routes import Target
from headrace_shared.testing.books import Request
from headrace_shared.usage import Usage


def bill(configuration: Configuration, provider: str, requests: Iterable[Request]) -> NanoUSD:
    """Return what a provider would charge for everything it generated, answered or not."""
    prices = PriceBook(configuration)
    return NanoUSD(sum(charge(prices, provider, request) for request in requests))


def charge(prices: PriceBook, provider: str, request: Request) -> NanoUSD:
    """Return what one request would be charged."""
    if request.usage is None:
        return NanoUSD(0)
    used = request.usage
    usage = Usage(used.prompt, used.cached, used.completion, 0, 0, used.tools)
    return prices.price(Target(provider, request.model)).cost(usage, request.hosted)
