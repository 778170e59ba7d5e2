"""Which target answers, what that costs at most, and the exact bytes that will be sent."""

from dataclasses import replace

from headrace_shared.errors import InvalidRequest, UnknownPrice
from headrace_shared.outcome import ErrorClass, Failed, Failure
from headrace_shared.request import prepare
from headrace_shared.routes import Target
from headrace_workers.breaker import Breakers
from headrace_workers.configured import Configured
from headrace_workers.execution import Run


class Route:
    def __init__(self, configured: Configured, breakers: Breakers) -> None:
        self._configured = configured
        self._breakers = breakers

    async def __call__(self, run: Run) -> Run:
        if run.ask is None:
            return run
        now = self._configured.now
        try:
            target = self._choose(now.configuration.resolve_route(run.ask.route).targets)
            price = now.prices.price(target)
        except UnknownPrice as error:
            return run.ended(Failed(Failure(ErrorClass.UNKNOWN_PRICE, error.message)))
        except InvalidRequest as error:
            return run.ended(Failed(Failure(ErrorClass.NO_ROUTE, error.message)))
        most = now.configuration.defaults.max_output_tokens
        try:
            request = prepare(run.ask.body, run.ask.endpoint, target.model, most)
        except InvalidRequest as error:
            return run.ended(Failed(Failure(ErrorClass.BAD_REQUEST, error.message)))
        return replace(run, target=target, price=price, request=request)

    def _choose(self, targets: tuple[Target, ...]) -> Target:
        """Take the first whose breaker lets calls through, else the first."""
        return next((target for target in targets if not self._breakers.of(target).is_open), targets[0])
