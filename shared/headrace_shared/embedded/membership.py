"""Coming in and going out: the first one in starts the servers, the last one out stops them."""

import asyncio
import fcntl
import os
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TypeVar

from headrace_shared import errors
from headrace_shared.embedded import binaries, record
from headrace_shared.embedded.postgres import Postgres
from headrace_shared.embedded.process import Process
from headrace_shared.embedded.record import EmbeddedServers, Record
from headrace_shared.embedded.server_user import ServerUser
from headrace_shared.embedded.valkey import Valkey

T = TypeVar("T")


@asynccontextmanager
async def embedded_servers(directory: Path, *, durable: bool = True) -> AsyncGenerator[EmbeddedServers]:
    """PostgreSQL and Valkey with their data in ``directory/.headrace``, started unless they run.

    A server that has crashed is started again, under the same address. ``durable=False`` is for tests: data
    outlives every process, but not the machine, and Valkey's is not kept at all.

    Raises EmbeddedServerFailed, or MissingExtra without ``headrace[embedded]``.
    """
    membership = _Membership(directory)
    try:
        started = await to_the_end(lambda: membership.enter(durable=durable))
        yield started.servers
    finally:
        await to_the_end(membership.leave)


@asynccontextmanager
async def join(start: Path) -> AsyncGenerator[EmbeddedServers | None]:
    """The servers that ``find_running`` finds, kept running for as long as this lasts; starts nothing."""
    found = await asyncio.to_thread(record.nearest, start)
    if found is None:
        yield None
        return
    membership = _Membership(found.folder.parent)
    try:
        running = await to_the_end(membership.enter_if_running)
        yield running.servers if running else None
    finally:
        await to_the_end(membership.leave)


def servers_in(directory: Path) -> tuple[Postgres, Valkey]:
    """The two servers of ``directory/.headrace``, for a participant that stops and starts them itself.

    Raises EmbeddedServerFailed when none were ever started there.
    """
    folder = directory.resolve() / record.FOLDER
    known = record.read(folder)
    user = ServerUser.choose(folder / "postgres")
    if known is None:
        raise Process("postgres", folder, user).failed("it was never started")
    return _servers(folder, user, known.sockets)


def _servers(folder: Path, user: ServerUser, sockets: Path) -> tuple[Postgres, Valkey]:
    postgres, valkey = (Process(name, folder, user) for name in ("postgres", "valkey"))
    return Postgres(postgres, sockets), Valkey(valkey, sockets)


class _Membership:
    def __init__(self, directory: Path) -> None:
        self._folder = directory.resolve() / record.FOLDER
        self._lock: int | None = None

    def enter(self, *, durable: bool) -> Record:
        binaries.require()
        self._make_folder()
        with self._alone():
            self._share()
            return self._start(durable=durable)

    def enter_if_running(self) -> Record | None:
        with self._alone():
            self._share()
            found = record.read(self._folder)
            return found if found and found.alive else None

    def leave(self) -> None:
        if self._lock is None:
            return
        with self._alone():
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            else:
                self._stop()
            finally:
                os.close(self._lock)
                self._lock = None

    def _start(self, *, durable: bool) -> Record:
        user = ServerUser.choose(self._folder / "postgres")
        known = record.read(self._folder)
        reusable = known is not None and user.can_use(known.sockets)
        sockets = known.sockets if known and reusable else user.make_socket_directory()
        written = record.write(self._folder, sockets)
        for server in _servers(self._folder, user, sockets):
            user.let_through(server.process.home)
            user.make_private(server.process.home)
            server.ensure_running(durable=durable)
        return written

    def _stop(self) -> None:
        known = record.read(self._folder)
        if known is None:
            return
        user = ServerUser.choose(self._folder / "postgres")
        for server in _servers(self._folder, user, known.sockets):
            if server.process.is_running():
                server.stop()
        record.remove_sockets(known.sockets)

    def _make_folder(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise errors.InvalidConfiguration(where=str(self._folder), reason=f"{error.strerror}") from error
        if not os.access(self._folder, os.W_OK):
            raise errors.InvalidConfiguration(where=str(self._folder), reason="belongs to another user")
        ignored = self._folder / ".gitignore"
        if not ignored.exists():
            ignored.write_text("*\n")

    def _share(self) -> None:
        self._lock = os.open(self._folder / "lock", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        fcntl.flock(self._lock, fcntl.LOCK_SH)

    @contextmanager
    def _alone(self) -> Generator[None]:
        """Only one process starts or stops at a time."""
        descriptor = os.open(self._folder / "start.lock", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


async def to_the_end(work: Callable[[], T]) -> T:
    """Run blocking work in a thread and wait for its end even when cancelled: half a start is a leak."""
    running = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        while not running.done():
            await asyncio.wait([running])
        raise
