"""The embedded Valkey."""

import shutil
import signal
import socket
from dataclasses import dataclass
from pathlib import Path

from headrace_shared.embedded import binaries, record
from headrace_shared.embedded.process import Process

DATA = "appendonlydir"
KILL_AFTER_SECONDS = 10.0
SETTINGS = {
    "appenddirname": DATA,
    "dir": ".",
    "loglevel": "notice",
    "maxmemory-policy": "noeviction",
    "pidfile": "valkey.pid",
    "port": "0",
    "save": "",
    "unixsocketperm": "700",
}


@dataclass(frozen=True, slots=True)
class Valkey:
    """The server in ``.headrace/valkey``, behind a socket in ``sockets``."""

    process: Process
    sockets: Path

    @property
    def url(self) -> str:
        return record.valkey_url(self.sockets)

    def ensure_running(self, *, durable: bool) -> None:
        path = record.valkey_socket(self.sockets)
        if self.process.is_running() and not record.answers(path):
            self.stop()
        if self.process.is_running() and self.process.becomes_ready(self._is_ready):
            return
        self.process.user.let_use(binaries.installed(binaries.valkey()))
        path.unlink(missing_ok=True)
        options = {**SETTINGS, "unixsocket": str(path), "appendonly": "yes" if durable else "no"}
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        self.process.spawn([str(binaries.valkey()), *arguments])
        if not self.process.becomes_ready(self._is_ready):
            raise self.process.failed("it ended while starting")

    def stop(self) -> None:
        self._ask(b"SHUTDOWN\r\n")
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.process.wait_until_gone(KILL_AFTER_SECONDS):
                return
            self._signal(number)
        self._wait_until_gone()

    def kill(self) -> None:
        """End it as a crash does: the last two seconds may not be on its disk."""
        self._signal(signal.SIGKILL)
        self._wait_until_gone()

    def copy_data(self, folder: Path) -> None:
        """Copy its files to a new folder while it stands still."""
        self._signal(signal.SIGSTOP)
        try:
            folder.mkdir()
            if self._data.is_dir():
                shutil.copytree(self._data, folder / DATA)
        finally:
            self._signal(signal.SIGCONT)

    def replace_data(self, folder: Path | None) -> None:
        """Put a copy in the place of its files, or nothing; it must not run."""
        shutil.rmtree(self._data, ignore_errors=True)
        if folder is not None and (folder / DATA).is_dir():
            shutil.copytree(folder / DATA, self._data)
            for path in (self._data, *self._data.iterdir()):
                self.process.user.own(path)

    @property
    def _data(self) -> Path:
        return self.process.home / DATA

    def _signal(self, number: signal.Signals) -> None:
        self.process.signal(self.process.home / "valkey.pid", number)

    def _wait_until_gone(self) -> None:
        if not self.process.wait_until_gone():
            raise self.process.failed("it does not stop")

    def _is_ready(self) -> bool:
        return self._ask(b"PING\r\n").startswith(b"+PONG")

    def _ask(self, command: bytes) -> bytes:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(record.REPLY_SECONDS)
            try:
                connection.connect(str(record.valkey_socket(self.sockets)))
                connection.sendall(command)
                return connection.recv(64)
            except OSError:
                return b""
