"""One client per provider, made when it is first needed and kept."""

from headrace_workers.configured import Configured
from headrace_workers.providers import ProviderClient


class Clients:
    """The process's clients; a provider that was configured anew gets a new one."""

    def __init__(self, configured: Configured, *, connections: int) -> None:
        self._configured = configured
        self._connections = connections
        self._clients: dict[str, tuple[int, ProviderClient]] = {}
        self._retired: list[ProviderClient] = []

    def of(self, provider: str) -> ProviderClient:
        """Return the client of a provider.

        Raises:
            MissingSetting: its key is not there.

        """
        now = self._configured.now
        known = self._clients.get(provider)
        if known is not None and known[0] == now.version:
            return known[1]
        client = ProviderClient(now.configuration.provider(provider), connections=self._connections)
        if known is not None:
            # Calls may be out on it: it is closed with the process.
            self._retired.append(known[1])
        self._clients[provider] = (now.version, client)
        return client

    async def close(self) -> None:
        for client in [*self._retired, *(client for _, client in self._clients.values())]:
            await client.close()
