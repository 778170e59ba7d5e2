"""The embedded Valkey."""

import signal
import socket
from dataclasses import dataclass
from pathlib import Path

from headrace_shared.embedded import binaries, record
from headrace_shared.embedded.process import Process

KILL_AFTER_SECONDS = 10.0
SETTINGS = {
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

    def ensure_running(self, *, durable: bool) -> None:
        path = record.valkey_socket(self.sockets)
        if self.process.is_running() and not record.answers(path):
            self.stop()
        if not self.process.is_running():
            self.process.user.let_use(binaries.installed(binaries.valkey()))
            path.unlink(missing_ok=True)
            options = {**SETTINGS, "unixsocket": str(path), "appendonly": "yes" if durable else "no"}
            arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
            self.process.spawn([str(binaries.valkey()), *arguments])
        self.process.wait_until_ready(self._is_ready)

    def stop(self) -> None:
        self._ask(b"SHUTDOWN\r\n")
        pid_file = self.process.home / "valkey.pid"
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.process.wait_until_gone(KILL_AFTER_SECONDS):
                return
            self.process.signal(pid_file, number)
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
