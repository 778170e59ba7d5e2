"""Starting a server that outlives its starter, and knowing whether it still runs.

A server inherits the descriptor of a locked file and so holds that lock for as long as it,
or a child of it, lives. That survives what a file with a process id does not: a recycled
id, a zombie, a wiped ``/tmp``.
"""

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from headrace_shared import errors
from headrace_shared.embedded.server_user import ServerUser

START_SECONDS = 60.0  # a big write-ahead log is replayed in this time
STOP_SECONDS = 30.0
POLL_SECONDS = 0.01


@dataclass(frozen=True, slots=True)
class Process:
    """One server: what it is called, and where its lock, its log and its files are."""

    name: str
    folder: Path
    user: ServerUser

    @property
    def home(self) -> Path:
        return self.folder / self.name

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    def is_running(self) -> bool:
        descriptor = self._open_lock()
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def spawn(self, command: Sequence[str]) -> None:
        """Run a command in its own session, so that Ctrl-C does not reach it; the shell orphans it."""
        descriptor = self._open_lock()
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with self.log.open("ab") as log:
                self.user.own(self.log)
                subprocess.run(  # noqa: S603
                    ["/bin/sh", "-c", '"$@" &', "sh", *command],
                    check=True,
                    cwd=self.home,
                    env=self.user.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    pass_fds=[descriptor],
                    user=self.user.uid,
                    group=self.user.gid,
                    extra_groups=self.user.extra_groups,
                )
        finally:
            os.close(descriptor)

    def run(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run one of the server's own tools to its end."""
        return subprocess.run(  # noqa: S603
            command,
            check=False,
            capture_output=True,
            text=True,
            cwd=self.home,
            env=self.user.environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            user=self.user.uid,
            group=self.user.gid,
            extra_groups=self.user.extra_groups,
        )

    def becomes_ready(self, ready: Callable[[], bool]) -> bool:
        """Wait until it is ready, or has ended: it may have been about to when it was looked at last."""
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            if not self.is_running():
                return False
            if time.monotonic() > deadline:
                raise self.failed(f"it was not ready after {START_SECONDS:g} s")
            time.sleep(POLL_SECONDS)
        return True

    def wait_until_gone(self, seconds: float = STOP_SECONDS) -> bool:
        deadline = time.monotonic() + seconds
        while self.is_running():
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def signal(self, pid_file: Path, number: signal.Signals) -> None:
        """Send a signal to the server, which must hold its lock: only then the file is not stale."""
        with suppress(OSError, ValueError, IndexError):
            os.kill(int(pid_file.read_text().splitlines()[0]), number)

    def failed(self, reason: str) -> errors.EmbeddedServerFailed:
        last = self.log.read_text(errors="replace").splitlines()[-1:] if self.log.exists() else []
        reason = "; its last line is: ".join([reason, *last])
        return errors.EmbeddedServerFailed(server=self.name, reason=reason, log=str(self.log))

    def _open_lock(self) -> int:
        return os.open(self.folder / f"{self.name}.lock", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
