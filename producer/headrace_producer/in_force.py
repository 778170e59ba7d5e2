"""The configuration that new jobs are checked against."""

import asyncio
from dataclasses import dataclass, field

from headrace_shared.configuration import Configuration
from headrace_shared.hosted_tools import Hosted
from headrace_shared.ids import RouteName
from headrace_shared.prices import PriceBook
from headrace_shared.request_bounds import WITHOUT_OUTPUT, Endpoint
from headrace_shared.store import configurations
from headrace_shared.store.pool import Database

_ANY_LENGTH = 2**31
_ROUTES_KEPT = 4096


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One version of the configuration, and the routes whose prices are known in it."""

    version: int
    configuration: Configuration
    prices: PriceBook
    _priced: dict[tuple[str, Endpoint, Hosted | None], RouteName] = field(
        default_factory=dict[tuple[str, Endpoint, Hosted | None], RouteName]
    )

    def priced_route(self, model: str, endpoint: Endpoint, hosted: Hosted | None = None) -> RouteName:
        """Return the route of a model, every target of which has a price.

        Raises:
            InvalidRequest: there is no such route.
            UnknownPrice: nobody says what a target of it, or a hosted tool there, costs.

        """
        known = self._priced.get((model, endpoint, hosted))
        if known is not None:
            return known
        route = self.configuration.resolve_route(model)
        for target in route.all_targets:
            written = 0 if endpoint in WITHOUT_OUTPUT else 1
            self.prices.price(target).worst_case(_ANY_LENGTH, written, hosted)
        if len(self._priced) >= _ROUTES_KEPT:
            self._priced.clear()
        self._priced[model, endpoint, hosted] = route.name
        return route.name


class InForce:
    """Keeps the newest configuration; the insertion of jobs says when there is a newer one."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._loading = asyncio.Lock()
        self._now: Snapshot | None = None

    async def now(self) -> Snapshot:
        """Return the configuration as it was when it was looked at last."""
        return self._now or await self.after(None)

    async def after(self, old: Snapshot | None) -> Snapshot:
        """Return a configuration that was read after another one, once for all who ask."""
        async with self._loading:
            if self._now is None or self._now is old:
                self._now = await read_snapshot(self._database)
            return self._now


async def read_snapshot(database: Database) -> Snapshot:
    """Read the configuration that is in force for a connection."""
    current = await configurations.current(database)
    return Snapshot(current.version, current.configuration, PriceBook(current.configuration))
