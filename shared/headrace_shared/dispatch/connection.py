"""The way to Redis: the one file that touches redis-py, whose types say little.

Everything Headrace asks of Redis is a script, a bell, or a message. A server that is away
is one error, `DispatchUnavailable`, and one that comes back as another (another run id) is
noticed at the first connection to it.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
import asyncio
import hashlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.resources import files
from typing import cast
from urllib.parse import urlsplit

import redis.asyncio
import redis.exceptions
from redis.asyncio.client import PubSub
from redis.asyncio.connection import AbstractConnection

from headrace_shared.errors import DispatchTooOld, DispatchUnavailable, InvalidConfiguration

Argument = str | bytes | int
_LUA = files("headrace_shared.dispatch").joinpath("lua")
_AWAY = (redis.exceptions.RedisError, OSError, TimeoutError)
_OLDEST_SUPPORTED = 7

COMMAND_SECONDS = 10.0
"""How long a command may take before the server counts as away."""


@dataclass(frozen=True, slots=True)
class Script:
    """A `.lua` file behind the common prelude."""

    name: str
    text: str
    sha: str

    @classmethod
    def load(cls, name: str) -> "Script":
        text = "\n".join(
            _LUA.joinpath(f"{part}.lua").read_text(encoding="utf-8") for part in ("prelude", name)
        )
        return cls(name, text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


class Redis:
    """A pool of connections to one Redis or Valkey server."""

    def __init__(self, url: str) -> None:
        if urlsplit(url).scheme not in ("redis", "rediss", "unix"):
            raise InvalidConfiguration(
                where="HEADRACE_REDIS_URL", reason="must begin with redis://, rediss:// or unix://"
            )
        self.address = urlsplit(url).hostname or urlsplit(url).path
        self.run_id = ""
        """The run id of the server that was connected to last."""
        self._client = redis.asyncio.Redis.from_url(
            url,
            # redis-py would put its timeout around each send with wait_for, which can swallow a
            # cancellation on Python 3.11: the commands have a deadline of their own instead.
            socket_timeout=None,
            socket_connect_timeout=5,
            redis_connect_func=self._connected,
            max_connections=1000,
        )

    async def _connected(self, connection: AbstractConnection) -> None:
        await connection.on_connect()
        await connection.send_command("INFO", "server")
        info = _parse_info(cast("bytes", await connection.read_response()))
        self.run_id = info.get("run_id", "")
        version = info.get("valkey_version") or info.get("redis_version", "0")
        if int(version.split(".")[0]) < _OLDEST_SUPPORTED:
            raise DispatchTooOld(address=self.address, version=version)

    async def check(self) -> None:
        """Raise DispatchUnavailable or DispatchTooOld unless the server can be used."""
        await self._command("PING")

    async def evaluate(
        self, script: Script, keys: Sequence[str] = (), args: Sequence[Argument] = ()
    ) -> object:
        """Run a script; it is sent in full only to a server that does not have it."""
        try:
            return await self._command("EVALSHA", script.sha, len(keys), *keys, *args)
        except redis.exceptions.NoScriptError:
            return await self._command("EVAL", script.text, len(keys), *keys, *args)

    async def evaluate_all(self, script: Script, calls: Sequence[Sequence[Argument]]) -> list[object]:
        """Run a script for each list of arguments, in one round trip."""
        if len(calls) == 1:
            return [await self.evaluate(script, (), calls[0])]
        commands = [("EVALSHA", script.sha, 0, *args) for args in calls]
        try:
            return await self._commands(commands)
        except redis.exceptions.NoScriptError:
            await self._command("SCRIPT LOAD", script.text)
            return await self._commands(commands)

    async def wait_for(self, bells: Sequence[str], timeout: float) -> bool:
        """Wait until one of the bells rings, for some seconds at most."""
        rung = await self._command("BLPOP", *bells, f"{timeout:.3f}", seconds=timeout + COMMAND_SECONDS)
        return rung is not None

    async def ring(self, bell: str) -> None:
        """Leave a token for whoever waits at a bell; what nobody takes does not pile up."""
        await self._commands([("RPUSH", bell, "1"), ("LTRIM", bell, 0, 63)])

    async def hash(self, key: str) -> Mapping[str, str]:
        """Return all fields of a hash."""
        fields = cast("dict[bytes, bytes]", await self._command("HGETALL", key))
        return {field.decode(): value.decode() for field, value in fields.items()}

    async def remove(self, key: str | bytes, member: bytes) -> None:
        """Take a member out of a sorted set."""
        await self._command("ZREM", key, member)

    async def publish(self, channel: str) -> None:
        """Send a message without content to a channel."""
        await self._command("PUBLISH", channel, "1")

    async def _command(self, *words: Argument, seconds: float = COMMAND_SECONDS) -> object:
        try:
            async with asyncio.timeout(seconds):
                return cast("object", await self._client.execute_command(*words))
        except redis.exceptions.NoScriptError:
            raise
        except _AWAY as error:
            raise unavailable(self.address, error) from error

    async def _commands(self, commands: Sequence[Sequence[Argument]]) -> list[object]:
        try:
            async with asyncio.timeout(COMMAND_SECONDS), self._client.pipeline(transaction=False) as pipe:
                for words in commands:
                    pipe.execute_command(*words)
                return cast("list[object]", await pipe.execute())
        except redis.exceptions.NoScriptError:
            raise
        except _AWAY as error:
            raise unavailable(self.address, error) from error

    @asynccontextmanager
    async def listener(self) -> AsyncGenerator["Listener"]:
        """Open one connection that hears channels."""
        pubsub = self._client.pubsub(ignore_subscribe_messages=True)
        try:
            yield Listener(pubsub, self.address)
        finally:
            await pubsub.aclose()

    async def close(self) -> None:
        await self._client.aclose()


class Listener:
    """A connection that hears the channels it was told to."""

    def __init__(self, pubsub: PubSub, address: str) -> None:
        self._pubsub = pubsub
        self._address = address

    async def subscribe(self, channel: str) -> None:
        try:
            async with asyncio.timeout(COMMAND_SECONDS):
                await self._pubsub.subscribe(channel)
        except _AWAY as error:
            raise unavailable(self._address, error) from error

    async def unsubscribe(self, channel: str) -> None:
        try:
            async with asyncio.timeout(COMMAND_SECONDS):
                await self._pubsub.unsubscribe(channel)
        except _AWAY as error:
            raise unavailable(self._address, error) from error

    async def next(self, timeout: float) -> str | None:
        """Return the channel of the next message, or None when none came in time."""
        try:
            message = await self._pubsub.get_message(timeout=timeout)
        except _AWAY as error:
            raise unavailable(self._address, error) from error
        return cast("bytes", message["channel"]).decode() if message else None


def milliseconds(duration: timedelta) -> int:
    """Return a duration as scripts take it; rounded up, so that no id comes due before its row does."""
    return -(-duration // timedelta(milliseconds=1))


def unavailable(address: str, error: BaseException) -> DispatchUnavailable:
    return DispatchUnavailable(address=address, reason=str(error) or type(error).__name__)


def _parse_info(raw: bytes) -> dict[str, str]:
    lines = (line.split(":", 1) for line in raw.decode().splitlines() if ":" in line)
    return {name: value.strip() for name, value in lines}
