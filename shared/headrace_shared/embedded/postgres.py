"""The embedded PostgreSQL."""

import shutil
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from headrace_shared.embedded import binaries, record
from headrace_shared.embedded.process import STOP_SECONDS, Process

INITDB = (
    "--auth=trust",  # whoever may enter the socket's folder
    "--encoding=UTF8",
    "--locale-provider=builtin",
    "--locale=C.UTF-8",
    "--no-instructions",
    "--username=postgres",
)
SETTINGS = {
    "jit": "off",
    "listen_addresses": "",
    "max_connections": "200",
    "max_wal_size": "2GB",
    "shared_buffers": "128MB",
    "timezone": "UTC",
    "unix_socket_permissions": "0700",
}
THROW_AWAY = {"fsync": "off", "full_page_writes": "off", "max_wal_senders": "0", "wal_level": "minimal"}


@dataclass(frozen=True, slots=True)
class Postgres:
    """The server in ``.headrace/postgres``, behind a socket in ``sockets``."""

    process: Process
    sockets: Path

    @property
    def url(self) -> str:
        return record.postgres_url(self.sockets)

    def ensure_running(self, *, durable: bool) -> None:
        if self.process.is_running() and not record.answers(record.postgres_socket(self.sockets)):
            self.stop()
        if self.process.is_running() and self.process.becomes_ready(self._is_ready):
            return
        self._initialise()
        self._remove_leftovers()
        settings = {**SETTINGS, **({} if durable else THROW_AWAY)}
        self.process.spawn(self._command({**settings, "unix_socket_directories": str(self.sockets)}))
        if not self.process.becomes_ready(self._is_ready):
            raise self.process.failed("it ended while starting")

    def stop(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Fast: sessions end, the data is written. Immediate: as in a crash; the next start recovers."""
        command = [str(binaries.postgres("pg_ctl")), "stop", "--pgdata=.", f"--mode={mode}", "--silent"]
        self.process.run([*command, f"--timeout={STOP_SECONDS:.0f}"])
        if self.process.wait_until_gone():
            return
        self.signal(signal.SIGQUIT)
        if not self.process.wait_until_gone():
            raise self.process.failed("it does not stop")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the postmaster, which does not hand on every signal to its sessions."""
        self.process.signal(self.process.home / "postmaster.pid", number)

    def _initialise(self) -> None:
        """Made beside its place and moved there: a half-made one is never taken for data."""
        self.process.user.let_use(binaries.installed(binaries.postgres("postgres")))
        if (self.process.home / "PG_VERSION").exists():
            return
        draft = self.process.home.with_name("postgres.draft")
        shutil.rmtree(draft, ignore_errors=True)
        self.process.user.make_private(draft)
        made = self.process.run([str(binaries.postgres("initdb")), *INITDB, f"--pgdata=../{draft.name}"])
        if made.returncode != 0:
            raise self.process.failed(made.stderr.strip() or "initdb failed")
        draft.rename(self.process.home)

    def _remove_leftovers(self) -> None:
        """Nobody runs: a crashed server's lock files would stop a new one if its id is in use again."""
        found = record.postgres_socket(self.sockets)
        for path in (self.process.home / "postmaster.pid", found, found.with_name(f"{found.name}.lock")):
            path.unlink(missing_ok=True)

    def _command(self, settings: Mapping[str, str]) -> list[str]:
        options = [f"--{name}={value}" for name, value in settings.items()]
        return [str(binaries.postgres("postgres")), "-D", ".", "-p", str(record.PORT), *options]

    def _is_ready(self) -> bool:
        if not record.answers(record.postgres_socket(self.sockets)):
            return False
        command = [str(binaries.postgres("pg_isready")), "--quiet", f"--host={self.sockets}"]
        return self.process.run([*command, f"--port={record.PORT}"]).returncode == 0
