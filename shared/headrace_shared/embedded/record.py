"""What is written about running servers, and how others find it."""

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

FOLDER = ".headrace"
PORT = 5432  # only names the socket; given everywhere, so that nobody's PGPORT moves it
REPLY_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class EmbeddedServers:
    """Where the two servers listen; both are Unix sockets."""

    postgres_url: str
    redis_url: str


class Record(BaseModel):
    """``servers.json``: where the servers of one folder listen, or last listened."""

    model_config = ConfigDict(frozen=True)

    folder: Path
    sockets: Path
    postgres_url: str
    redis_url: str

    @property
    def servers(self) -> EmbeddedServers:
        return EmbeddedServers(postgres_url=self.postgres_url, redis_url=self.redis_url)

    @property
    def alive(self) -> bool:
        return answers(postgres_socket(self.sockets)) and answers(valkey_socket(self.sockets))


def find_running(start: Path) -> EmbeddedServers | None:
    """The live servers of the nearest ``.headrace/`` at or above a folder, without joining them."""
    record = nearest(start)
    return record.servers if record else None


def nearest(start: Path) -> Record | None:
    here = start.resolve()
    for folder in (here, *here.parents):
        record = read(folder / FOLDER)
        if record and record.alive:
            return record
    return None


def read(folder: Path) -> Record | None:
    """What the folder's record says, unless the folder is a copy of the one it was written for."""
    try:
        record = Record.model_validate_json((folder / "servers.json").read_bytes())
    except (OSError, ValidationError):
        return None
    return record if record.folder == folder else None


def write(folder: Path, sockets: Path) -> Record:
    record = Record(
        folder=folder,
        sockets=sockets,
        postgres_url=postgres_url(sockets),
        redis_url=valkey_url(sockets),
    )
    draft = folder / f"servers.json.{os.getpid()}"
    draft.write_text(record.model_dump_json(indent=2) + "\n")
    draft.replace(folder / "servers.json")
    return record


def postgres_url(sockets: Path) -> str:
    return f"postgresql://postgres@/postgres?host={sockets}&port={PORT}"


def valkey_url(sockets: Path) -> str:
    return f"unix://{valkey_socket(sockets)}"


def postgres_socket(sockets: Path) -> Path:
    return sockets / f".s.PGSQL.{PORT}"


def valkey_socket(sockets: Path) -> Path:
    return sockets / "valkey.sock"


def remove_sockets(sockets: Path) -> None:
    """Remove what a crashed server left, and the folder when nothing else is in it."""
    lock = postgres_socket(sockets).with_name(f".s.PGSQL.{PORT}.lock")
    with suppress(OSError):
        for path in (postgres_socket(sockets), lock, valkey_socket(sockets)):
            path.unlink(missing_ok=True)
        sockets.rmdir()


def answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(REPLY_SECONDS)
        try:
            connection.connect(str(path))
        except OSError:
            return False
    return True
