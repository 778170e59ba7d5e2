"""The configuration in force, with everything that is derived from it once."""

import asyncio
from dataclasses import dataclass

from headrace_shared.configuration import Configuration
from headrace_shared.policy import BreakerPolicy, RetryPolicy, Terms
from headrace_shared.prices import PriceBook
from headrace_shared.store import configurations
from headrace_shared.store.pool import Database


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One version of the configuration and what follows from it."""

    version: int
    configuration: Configuration
    prices: PriceBook
    retries: RetryPolicy
    breaker: BreakerPolicy
    terms: Terms


class Configured:
    """Keeps the newest version; each claim of jobs says which that is."""

    def __init__(self, database: Database, versioned: configurations.Versioned) -> None:
        self._database = database
        self._loading = asyncio.Lock()
        self.now = _snapshot(versioned)

    @classmethod
    async def load(cls, database: Database) -> "Configured":
        return cls(database, await configurations.current(database))

    async def follow(self, version: int) -> None:
        """Make sure that this version, or a newer one, is in force here."""
        if version <= self.now.version:
            return
        async with self._loading:
            if version > self.now.version:
                self.now = _snapshot(await configurations.current(self._database))


def _snapshot(versioned: configurations.Versioned) -> Snapshot:
    configuration = versioned.configuration
    return Snapshot(
        versioned.version,
        configuration,
        PriceBook(configuration),
        configuration.retry_policy(),
        configuration.breaker_policy(),
        configuration.terms(versioned.version),
    )
