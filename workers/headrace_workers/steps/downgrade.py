"""The other targets of a route, for a call that its budget has no room for."""

from collections.abc import Iterator

from headrace_shared.money import NanoUSD
from headrace_workers.choosing import Choosing
from headrace_workers.configured import Configured
from headrace_workers.execution import Run
from headrace_workers.offers import offer_of


class Downgrade:
    def __init__(self, configured: Configured, choosing: Choosing) -> None:
        self._configured = configured
        self._choosing = choosing

    def cheaper(self, run: Run, than: NanoUSD) -> Iterator[tuple[Run, NanoUSD]]:
        """Return a run as the other targets of its route, and its fallbacks, would answer it.

        Only those come that have met nothing in this run and are known to cost less at most, each with
        what that is: in their order, and those that can take a call now before the others.
        """
        if run.ask is None:
            return
        now = self._configured.now
        route = now.configuration.resolve_route(run.ask.route)
        passed = {run.target, *(one.target for one in run.met)}
        left = [target for target in route.all_targets if target not in passed]
        for target in sorted(left, key=self._choosing.is_in_trouble):
            offer = offer_of(now, run.ask, target)
            if offer is not None and offer.most < than:
                instead = run._replace(
                    target=target,
                    price=offer.price,
                    request=offer.request,
                    timeouts=route.timeouts.get(target),
                    downgraded=True,
                )
                yield instead, offer.most

    def taken(self, run: Run, instead: Run) -> None:
        """Count the call where it goes now."""
        if run.target is not None and instead.target is not None:
            self._choosing.ended(run.target, None)
            self._choosing.taken(instead.target)
