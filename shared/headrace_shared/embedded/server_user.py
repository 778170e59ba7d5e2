"""Who the servers run as: the caller, except for root, whom PostgreSQL refuses."""

import logging
import os
import pwd
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

NAME = "pgserver"
FALLBACK = "nobody"  # where no user can be added, as on a read-only root file system
LONGEST_SOCKET_DIRECTORY = 75  # a socket's whole path ends at 104 bytes on macOS

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServerUser:
    """An account to switch to before a server starts; ``None`` means no switch."""

    uid: int | None = None
    gid: int | None = None

    @classmethod
    def choose(cls, data: Path) -> Self:
        """The caller; for root the owner of the data, or a user made for the purpose."""
        if os.geteuid() != 0:
            return cls()
        if data.exists() and data.stat().st_uid != 0:
            return cls(uid=data.stat().st_uid, gid=data.stat().st_gid)
        entry = _system_user()
        return cls(uid=entry.pw_uid, gid=entry.pw_gid)

    @property
    def extra_groups(self) -> list[int] | None:
        return None if self.uid is None else []

    @property
    def environment(self) -> dict[str, str]:
        """Nothing of the caller's: a PGDATA, a PGPORT or a broken locale would change a server."""
        return {"LC_ALL": "C", "PATH": os.defpath}

    def own(self, path: Path) -> None:
        if self.uid is not None and self.gid is not None:
            os.chown(path, self.uid, self.gid)

    def make_private(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        self.own(folder)

    def let_through(self, path: Path) -> None:
        """Let the server user pass through (not list) the folders above a path."""
        above = path.parents if self.uid is not None else ()
        closed = [folder for folder in above if not folder.stat().st_mode & stat.S_IXOTH]
        for folder in closed:
            folder.chmod(folder.stat().st_mode | stat.S_IXOTH)
        if closed:
            logger.warning("servers do not run as root: other users may now pass through %s", closed[-1])

    def let_use(self, installed: Iterable[Path]) -> None:
        """Let the server user read and run what is in some folders, whatever root's umask was."""
        for tree in installed if self.uid is not None else ():
            self.let_through(tree)
            closed = not tree.stat().st_mode & stat.S_IROTH
            for path in (tree, *tree.rglob("*")) if closed else ():
                mode = path.stat().st_mode
                path.chmod(mode | stat.S_IROTH | (stat.S_IXOTH if mode & stat.S_IXUSR else 0))

    def can_use(self, sockets: Path) -> bool:
        """Whether it is the user's own private folder: in a shared /tmp somebody else may have made it."""
        try:
            found = sockets.lstat()
        except OSError:
            return False
        owner = os.geteuid() if self.uid is None else self.uid
        return stat.S_ISDIR(found.st_mode) and found.st_uid == owner and not found.st_mode & 0o077

    def make_socket_directory(self) -> Path:
        """A new private folder with a short name without spaces, as sockets need."""
        sockets = Path(tempfile.mkdtemp(prefix="headrace-", dir=self._temporary()))
        self.own(sockets)
        return sockets

    def _temporary(self) -> Path:
        usual = Path(tempfile.gettempdir())
        short = len(os.fsencode(usual)) <= LONGEST_SOCKET_DIRECTORY - len("/headrace-12345678")
        plain = all(letter.isalnum() or letter in "/._-" for letter in str(usual))
        passable = self.uid is None or all(
            folder.stat().st_mode & stat.S_IXOTH for folder in (usual, *usual.parents)
        )
        return usual if short and plain and passable else Path("/tmp")  # noqa: S108  mkdtemp makes it private


def _system_user() -> pwd.struct_passwd:
    try:
        return pwd.getpwnam(NAME)
    except KeyError:
        add = shutil.which("useradd", path=f"{os.defpath}:/usr/sbin:/sbin")
    if add:
        command = [add, "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", NAME]
        subprocess.run(command, check=False, capture_output=True)  # noqa: S603
    try:
        return pwd.getpwnam(NAME)
    except KeyError:
        return pwd.getpwnam(FALLBACK)
