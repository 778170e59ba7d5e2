"""Which target answers, what that costs at most, and the exact bytes that will be sent."""

from functools import partial

from headrace_shared.errors import InvalidRequest, UnknownPrice
from headrace_shared.outcome import ErrorClass, Failed, Failure
from headrace_shared.routes import Target
from headrace_workers.breaker import Permit
from headrace_workers.choosing import Choosing
from headrace_workers.configured import Configured
from headrace_workers.execution import Ask, Run
from headrace_workers.last_resort import NO_REQUEST, no_price, static_target
from headrace_workers.offers import most_cost, request_for


class Route:
    def __init__(self, configured: Configured, choosing: Choosing) -> None:
        self._configured = configured
        self._choosing = choosing

    async def __call__(self, run: Run) -> Run:
        if run.ask is None:
            return run
        if run.last_resort is not None:
            return self._towards(run, static_target(run.ask.route))
        return self._prepared(run, run.ask)

    def _prepared(self, run: Run, ask: Ask) -> Run:
        now = self._configured.now
        try:
            route = now.configuration.resolve_route(ask.route)
            target = run.bound_for or self._choosing.first(route, run.met, partial(most_cost, now, ask))
            price = now.prices.price(target)
        except UnknownPrice as error:
            return run.ended(Failed(Failure(ErrorClass.UNKNOWN_PRICE, error.message)))
        except InvalidRequest as error:
            return run.ended(Failed(Failure(ErrorClass.NO_ROUTE, error.message)))
        try:
            request = request_for(now, ask, price)
        except InvalidRequest as error:
            return run.ended(Failed(Failure(ErrorClass.BAD_REQUEST, error.message)))
        # From here on `settle` takes it back: nothing is awaited in between.
        self._choosing.taken(target)
        timeouts = route.timeouts.get(target)
        return run._replace(target=target, price=price, request=request, timeouts=timeouts)

    def _towards(self, run: Run, target: Target) -> Run:
        """Nobody is called: no breaker is asked, and what is held for it is nothing."""
        self._choosing.taken(target)
        return run._replace(target=target, price=no_price(target), request=NO_REQUEST, permit=Permit())
