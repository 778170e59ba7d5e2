"""Where a server's URL leads, and the same URL leading through a proxy."""

import asyncio
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeAlias
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit, urlunsplit

from headrace_shared.errors import InvalidConfiguration

_PORTS = {"postgresql": "5432", "postgres": "5432", "redis": "6379", "http": "80"}
_Query: TypeAlias = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Target:
    """A server's address and the parts of its URL that a proxy keeps."""

    parts: SplitResult
    query: _Query
    host: str
    """A name, an address, or the path of a Unix socket."""
    port: int

    @classmethod
    def parse(cls, url: str) -> Self:
        """Read a postgresql://, redis://, unix:// or http:// URL.

        Raises:
            InvalidConfiguration: it is of another kind, names several hosts, or demands TLS to a name.

        """
        parts = urlsplit(url)
        query = tuple(parse_qsl(parts.query, keep_blank_values=True))
        if parts.scheme == "unix":
            return cls(parts, query, parts.path, 0)
        if parts.scheme not in _PORTS:
            raise _refused(f"a proxy passes {', '.join(_PORTS)} or unix, not {parts.scheme}")
        settings = dict(query) if parts.scheme.startswith("postgres") else {}
        if settings.get("sslmode", "").startswith("verify-"):
            raise _refused("sslmode=verify-* names a host, which a proxy is not")
        name, port = _host_and_port(parts)
        host = name or settings.get("host", "localhost")
        if "," in host:
            raise _refused("a proxy leads to one host, not to several")
        number = int(port or settings.get("port", _PORTS[parts.scheme]))
        return cls(parts, query, _socket(host, number) if host.startswith("/") else host, number)

    def through(self, port: int) -> str:
        """Return the URL with this loopback port in the place of the server."""
        user, at, _ = self.parts.netloc.rpartition("@")
        netloc = f"{user}{at}127.0.0.1:{port}"
        if self.parts.scheme == "unix":
            return urlunsplit(self.parts._replace(scheme="redis", netloc=netloc, path=""))
        if not self.parts.scheme.startswith("postgres"):
            return urlunsplit(self.parts._replace(netloc=netloc))
        kept = [(name, value) for name, value in self.query if name not in ("host", "port")]
        if "sslmode" not in dict(kept):
            kept.append(("sslmode", "disable"))
        return urlunsplit(self.parts._replace(netloc=netloc, query=urlencode(kept, safe="/")))

    async def connect(self) -> socket.socket:
        """Open a non-blocking connection to the server; raise OSError when nothing answers."""
        loop = asyncio.get_running_loop()
        if self.host.startswith("/"):
            return await _connected(socket.AF_UNIX, self.host)
        last = OSError(f"{self.host} has no address")
        for family, _, _, _, address in await loop.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM):
            try:
                return await _connected(family, address)
            except OSError as error:
                last = error
        raise last


async def _connected(family: int, address: str | tuple[object, ...]) -> socket.socket:
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.settimeout(0)
        await asyncio.get_running_loop().sock_connect(connection, address)
    except BaseException:
        connection.close()
        raise
    return connection


def _host_and_port(parts: SplitResult) -> tuple[str, str]:
    """Of a URL's middle; `hostname` would write a socket's folder in small letters."""
    place = parts.netloc.rpartition("@")[2]
    if place.startswith("["):
        host, _, rest = place[1:].partition("]")
        return host, rest.removeprefix(":")
    host, _, port = place.partition(":")
    return unquote(host), port


def _socket(folder: str, port: int) -> str:
    return str(Path(folder) / f".s.PGSQL.{port}")


def _refused(reason: str) -> InvalidConfiguration:
    return InvalidConfiguration(where="the URL of a server", reason=reason)
