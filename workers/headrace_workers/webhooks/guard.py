"""The dial guard: a callback never reaches inside the network.

A name is resolved once, every answer must be allowed, and one of these very answers is
dialled, so that no second lookup can say something else. The URL stays as it is: Host,
SNI and certificate checks see the name.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import cast

import httpcore2

from headrace_shared import errors
from headrace_shared.networks import Network, may_reach, parse_address

Resolver = Callable[[str, int], Awaitable[Sequence[str]]]
"""From a host and a port to its addresses."""

CONNECT_TIMEOUT = timedelta(seconds=5)
_MAX_DIALS = 3
_LOOKUP_THREADS = 32


class Guard(httpcore2.AsyncNetworkBackend):
    """A network backend for `httpcore2.AsyncConnectionPool` that dials only allowed addresses."""

    def __init__(
        self, *, allowed_networks: tuple[Network, ...] = (), resolve: Resolver | None = None
    ) -> None:
        self._allowed_networks = allowed_networks
        self._resolve = resolve or _ThreadedResolver()
        # The package declares this name twice; the cast names the one that is there.
        self._network = cast("httpcore2.AsyncNetworkBackend", httpcore2.AnyIOBackend())

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Connect to a host's first address that answers.

        Raises:
            WebhookRefused: one of the host's addresses is not allowed; nothing was dialled.
            httpcore2.ConnectError: the host has no address, or none answers.

        """
        addresses = await self._allowed_addresses(host, port)
        failure: Exception = httpcore2.ConnectError(f"{host} has no address")
        for address in addresses[:_MAX_DIALS]:
            try:
                return _open(
                    await self._network.connect_tcp(address, port, timeout, local_address, socket_options)
                )
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        raise failure

    async def connect_unix_socket(
        self,
        path: str,  # noqa: ARG002
        timeout: float | None = None,  # noqa: ARG002 - the signature of the base class
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,  # noqa: ARG002
    ) -> httpcore2.AsyncNetworkStream:
        raise errors.WebhookRefused(reason="it is a Unix socket")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def _allowed_addresses(self, host: str, port: int) -> list[str]:
        found = [parse_address(answer) for answer in await self._resolve(host, port)]
        addresses = [address for address in found if address is not None]
        if len(addresses) < len(found) or not all(
            may_reach(one, self._allowed_networks) for one in addresses
        ):
            raise errors.WebhookRefused(reason="it is not a public one")
        return [str(address) for address in addresses]


def _open(stream: httpcore2.AsyncNetworkStream) -> httpcore2.AsyncNetworkStream:
    # What was reset right after it was made has no socket any more: httpcore2 asks it for its
    # attributes next, and anyio stumbles over that instead of saying that it is closed.
    try:
        stream.get_extra_info("ssl_object")
    except (AttributeError, OSError) as error:
        raise httpcore2.ConnectError("the connection was reset") from error
    return stream


class _ThreadedResolver:
    """The system's resolver, in threads of its own: a slow name server holds up no other lookup."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_LOOKUP_THREADS, thread_name_prefix="webhook-lookup")

    async def __call__(self, host: str, port: int) -> list[str]:
        lookup = asyncio.get_running_loop().run_in_executor(self._threads, _lookup, host, port)
        try:
            answers = await lookup
        except (OSError, ValueError) as error:  # ValueError: a name that IDNA refuses
            raise httpcore2.ConnectError(f"{host} has no address") from error
        return list(dict.fromkeys(answers))


def _lookup(host: str, port: int) -> list[str]:
    answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return [str(answer[4][0]) for answer in answers]
