"""The way to Redis: the one file that touches redis-py, whose types say little.

Everything Headrace asks of Redis is a script, a bell, or a message. A server that is away
is one error, `DispatchUnavailable`, and one that comes back as another (another run id) is
noticed at the first connection to it.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from importlib.resources import files
from typing import TypeVar, cast
from urllib.parse import urlsplit

import redis.asyncio
import redis.exceptions
from redis.asyncio.client import PubSub
from redis.asyncio.connection import AbstractConnection

from headrace_shared.dispatch.keys import FEEDER_BELL, PROBE
from headrace_shared.errors import (
    DispatchDamaged,
    DispatchTooOld,
    DispatchUnavailable,
    InvalidConfiguration,
)

_logger = logging.getLogger(__name__)

T = TypeVar("T")

Argument = str | bytes | int
_LUA = files("headrace_shared.dispatch").joinpath("lua")
# uvloop raises RuntimeError for what is written to a connection that was reset at that moment.
_BROKEN = (OSError, TimeoutError, RuntimeError)
_AWAY = (redis.exceptions.RedisError, *_BROKEN)
_NO_ANSWER = (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, *_BROKEN)
_OLDEST_SUPPORTED = 7

COMMAND_SECONDS = 10.0
"""How long a command may take before the server counts as away."""

_PAUSE_OF_USELESS_REPAIRS = 1.0
_SHORTEST_ABSENCE, _LONGEST_ABSENCE = 0.05, 1.0


@dataclass(frozen=True, slots=True)
class Script:
    """A `.lua` file behind the common prelude."""

    name: str
    text: str
    sha: str
    counts_money: bool = False
    """A failure in the middle of it leaves counters that must be put in place from the ledger."""

    @classmethod
    def load(cls, name: str, *, using: tuple[str, ...] = (), counts_money: bool = False) -> "Script":
        """Read a file and put the prelude, and what else it uses, before it."""
        parts = ("prelude", *using, name)
        text = "\n".join(_LUA.joinpath(f"{part}.lua").read_text(encoding="utf-8") for part in parts)
        sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        return cls(name, text, sha, counts_money)


_REPAIR = Script.load("repair")


class _Absence:
    """A server that did not answer is left alone for a moment, longer each time, a second at most.

    Then one command finds out whether it is back, while the others go on failing at once: an outage
    costs a process a connection a second, whatever it runs.
    """

    def __init__(self) -> None:
        self._reason = ""
        self._pause = 0.0
        self._until = 0.0
        self._asked = False

    def refuse(self, address: str) -> None:
        """Raise DispatchUnavailable, with the reason of the last time, unless it is time to ask."""
        if not self._pause:
            return
        if time.monotonic() < self._until:
            raise DispatchUnavailable(address=address, reason=self._reason)
        self._asked = True
        self._until = time.monotonic() + _LONGEST_ABSENCE

    def prolong(self, error: BaseException) -> None:
        # Commands that were on their way together fail together: that is one failure.
        if self._pause and not self._asked:
            return
        self._reason = str(error) or type(error).__name__
        self._pause = min(max(2 * self._pause, _SHORTEST_ABSENCE), _LONGEST_ABSENCE)
        self._until = time.monotonic() + self._pause
        self._asked = False

    def end(self) -> None:
        self._pause, self._asked = 0.0, False


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
        self._absence = _Absence()
        self._foreign = 0
        self._repairing = asyncio.Lock()
        self._repairs = 0
        self._no_repair_before = 0.0
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
        before, self.run_id = self.run_id, info.get("run_id", "")
        version = info.get("valkey_version") or info.get("redis_version", "0")
        if int(version.split(".")[0]) < _OLDEST_SUPPORTED:
            raise DispatchTooOld(address=self.address, version=version)
        if before and before != self.run_id:
            # On this very connection, before anything else is asked of the other server.
            await connection.send_command("RPUSH", FEEDER_BELL, "1")
            with contextlib.suppress(redis.exceptions.ResponseError):
                await connection.read_response()

    def take_foreign(self) -> int:
        """Return how many foreign keys this process dropped since it was asked last."""
        count, self._foreign = self._foreign, 0
        return count

    async def check(self) -> None:
        """Raise DispatchUnavailable or DispatchTooOld unless the server can be used."""
        await self._command("PING")

    async def check_writable(self, *, seconds: float = COMMAND_SECONDS) -> None:
        """Raise DispatchUnavailable unless the server takes writes: a full one does not, nor a replica."""
        await self._command("SET", PROBE, "1", "PX", 60000, seconds=seconds)

    async def evaluate(
        self, script: Script, keys: Sequence[str] = (), args: Sequence[Argument] = ()
    ) -> object:
        """Run a script; it is sent in full only to a server that does not have it.

        Raises:
            DispatchUnavailable: the server is away, or (DispatchDamaged) what is in it cannot be repaired.

        """
        return await self._mended(partial(self._evaluate, script, keys, args), money=script.counts_money)

    async def _evaluate(self, script: Script, keys: Sequence[str], args: Sequence[Argument]) -> object:
        try:
            return await self._command("EVALSHA", script.sha, len(keys), *keys, *args)
        except redis.exceptions.NoScriptError:
            return await self._command("EVAL", script.text, len(keys), *keys, *args)

    async def evaluate_all(self, script: Script, calls: Sequence[Sequence[Argument]]) -> list[object]:
        """Run a script for each list of arguments, in one round trip."""
        if len(calls) == 1:
            return [await self.evaluate(script, (), calls[0])]
        return await self._mended(partial(self._evaluate_all, script, calls), money=script.counts_money)

    async def _evaluate_all(self, script: Script, calls: Sequence[Sequence[Argument]]) -> list[object]:
        commands = [("EVALSHA", script.sha, 0, *args) for args in calls]
        try:
            return await self._commands(commands)
        except redis.exceptions.NoScriptError:
            await self._command("SCRIPT LOAD", script.text)
            return await self._commands(commands)

    async def wait_for(self, bells: Sequence[str], timeout: float) -> bool:
        """Wait until one of the bells rings, for some seconds at most."""
        words = ("BLPOP", *bells, f"{timeout:.3f}")
        rung = await self._mended(partial(self._command, *words, seconds=timeout + COMMAND_SECONDS))
        return rung is not None

    async def ring(self, bell: str) -> None:
        """Leave a token for whoever waits at a bell; what nobody takes does not pile up."""
        await self._mended(partial(self._commands, [("RPUSH", bell, "1"), ("LTRIM", bell, 0, 63)]))

    async def text(self, key: str) -> str | None:
        """Return a string."""
        value = cast("bytes | None", await self._mended(partial(self._command, "GET", key)))
        return None if value is None else value.decode(errors="replace")

    async def set_text(self, key: str, value: str) -> None:
        await self._mended(partial(self._command, "SET", key, value))

    async def hash(self, key: str) -> Mapping[str, str]:
        """Return all fields of a hash; bytes that are no text in them are replaced."""
        reply = await self._mended(partial(self._command, "HGETALL", key))
        fields = cast("dict[bytes, bytes]", reply)
        return {
            field.decode(errors="replace"): value.decode(errors="replace") for field, value in fields.items()
        }

    async def names(self, pattern: str) -> list[str]:
        """Return the names of the keys that match a pattern; it may take a while, and holds nobody up."""
        found: set[bytes] = set()
        cursor: int | bytes = 0
        while True:
            reply = await self._command("SCAN", cursor, "MATCH", pattern, "COUNT", 1000)
            cursor, page = cast("tuple[int, list[bytes]]", reply)
            found.update(page)
            if cursor == 0:
                return sorted(name.decode(errors="replace") for name in found)

    async def remove(self, key: str | bytes, member: bytes) -> None:
        """Take a member out of a sorted set."""
        await self._mended(partial(self._command, "ZREM", key, member))

    async def publish(self, channel: str) -> None:
        """Send a message without content to a channel."""
        await self._command("PUBLISH", channel, "1")

    async def administer(self, *words: Argument) -> object:
        """Send an operator's command, as CONFIG or FLUSHALL."""
        return await self._command(*words)

    async def _mended(self, call: Callable[[], Awaitable[T]], *, money: bool = False) -> T:
        """Call; where foreign bytes are in the way, drop them and call once more."""
        try:
            return await call()
        except DispatchDamaged:
            await self._repair(money=money)
        try:
            return await call()
        except DispatchDamaged:
            self._no_repair_before = time.monotonic() + _PAUSE_OF_USELESS_REPAIRS
            raise

    async def _repair(self, *, money: bool) -> None:
        """Drop what others left under our names; with `money`, the counters whatever they say.

        Tasks that find damage at the same time share one repair, and one that did not help is not
        soon followed by another: what is wrong then is something else. (One that found nothing to drop
        may have come after another process' own.)
        """
        seen = self._repairs
        async with self._repairing:
            if (seen != self._repairs and not money) or time.monotonic() < self._no_repair_before:
                return
            dropped = await self._drop_foreign(money=money)
            self._repairs += 1
            self._foreign += len(dropped)
            if dropped:
                what = b", ".join(sorted(set(dropped))).decode()
                _logger.warning("foreign bytes in the dispatch: %d dropped, in %s", len(dropped), what)

    async def _drop_foreign(self, *, money: bool) -> list[bytes]:
        dropped: list[bytes] = []
        cursor, flag = b"0", int(money)
        while True:
            reply = cast("list[bytes]", await self._evaluate(_REPAIR, (), [cursor, flag]))
            cursor, flag = reply[0], 0
            dropped += reply[1:]
            if cursor == b"0":
                return dropped

    async def _command(self, *words: Argument, seconds: float = COMMAND_SECONDS) -> object:
        async with self._asking(seconds):
            return cast("object", await self._client.execute_command(*words))

    async def _commands(self, commands: Sequence[Sequence[Argument]]) -> list[object]:
        async with self._asking(COMMAND_SECONDS), self._client.pipeline(transaction=False) as pipe:
            for words in commands:
                pipe.execute_command(*words)
            # Raised by itself it would carry the whole command, and with it names of tenants.
            replies = cast("list[object]", await pipe.execute(raise_on_error=False))
            for reply in replies:
                if isinstance(reply, redis.exceptions.RedisError):
                    raise reply
            return replies

    @asynccontextmanager
    async def _asking(self, seconds: float) -> AsyncGenerator[None]:
        self._absence.refuse(self.address)
        try:
            async with asyncio.timeout(seconds):
                yield
        except _NO_ANSWER as error:
            self._absence.prolong(error)
            raise _failure(self.address, error) from error
        except redis.exceptions.NoScriptError:
            self._absence.end()
            raise
        except redis.exceptions.RedisError as error:
            self._absence.end()
            raise _failure(self.address, error) from error
        self._absence.end()

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


def _failure(address: str, error: Exception) -> DispatchUnavailable:
    text = str(error)
    # What a server refuses to do has a class of its own (OOM, READONLY, NOPERM, whose code redis-py takes
    # off the text) or begins with a code. What cannot be read by a command or script has neither, but one.
    refused = text.partition(" ")[0].isupper() or "user_script" not in text
    unclassed = type(error) is redis.exceptions.ResponseError
    if unclassed and (text.startswith("WRONGTYPE") or not refused):
        return DispatchDamaged(address=address, reason=text)
    return unavailable(address, error)


def _parse_info(raw: bytes) -> dict[str, str]:
    lines = (line.split(":", 1) for line in raw.decode().splitlines() if ":" in line)
    return {name: value.strip() for name, value in lines}
