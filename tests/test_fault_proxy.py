"""The fault proxy: what a client sees of each fault, and what is left of it when it is healed."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable
from datetime import timedelta
from typing import TypeVar

import pytest

from headrace_shared.dispatch.connection import Redis
from headrace_shared.errors import DispatchUnavailable, InvalidConfiguration, StoreUnavailable
from headrace_shared.store.pool import connect, open_pool
from headrace_shared.testing.fault_proxy import FaultProxy
from headrace_shared.testing.network_faults import (
    Bandwidth,
    BlackHole,
    Drop,
    HalfOpen,
    Latency,
    NetworkFault,
    OneWay,
    Reset,
    Truncate,
)
from headrace_shared.testing.proxied_connection import Link

T = TypeVar("T")

GREETING = b"ready\n"
LONG = 32 * 1024 * 1024  # more than the kernel takes in on the way


async def soon(awaited: Awaitable[T]) -> T:
    """Wait; what never comes fails a test instead of keeping it."""
    async with asyncio.timeout(10):
        return await awaited


class Client:
    """A plain connection, and both of its ends in order."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, text: bytes) -> None:
        self.writer.write(text)

    async def line(self) -> bytes:
        return await soon(self.reader.readline())

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()


class Server:
    """A server of lines: it greets, and answers each with the same; it keeps what it was told."""

    def __init__(self) -> None:
        self.heard: asyncio.Queue[bytes] = asyncio.Queue()
        self.clients: list[Client] = []
        self.came = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.clients.append(Client(reader, writer))
        self.came.set()
        with contextlib.suppress(OSError):
            writer.write(GREETING)
            while line := await reader.readline():
                self.heard.put_nowait(line)
                writer.write(line)
            self.heard.put_nowait(b"")
        writer.close()


@pytest.fixture
async def server() -> Server:
    return Server()


@pytest.fixture
async def proxy(server: Server) -> AsyncIterator[FaultProxy]:
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0, limit=2 * LONG)
    port = listening.sockets[0].getsockname()[1]
    async with listening, FaultProxy(f"http://127.0.0.1:{port}/v1") as proxy:
        yield proxy
    for client in server.clients:
        await client.close()


@pytest.fixture
async def client(proxy: FaultProxy) -> AsyncIterator[Client]:
    client = await dial(proxy)
    assert await client.line() == GREETING
    yield client
    await client.close()


async def dial(proxy: FaultProxy) -> Client:
    return Client(*await asyncio.open_connection("127.0.0.1", proxy.port))


async def expect_echo(client: Client, text: bytes) -> None:
    client.send(text)
    assert await client.line() == text


@pytest.mark.parametrize(
    ("url", "through"),
    [
        ("postgresql://u:p%40@db/jobs", "postgresql://u:p%40@127.0.0.1:{}/jobs?sslmode=disable"),
        (
            "postgresql://u@/jobs?host=/run/Here&port=6000&sslmode=require&application_name=x",
            "postgresql://u@127.0.0.1:{}/jobs?sslmode=require&application_name=x",
        ),
        ("redis://:p@cache:7000/3", "redis://:p@127.0.0.1:{}/3"),
        ("unix://u:p@/run/valkey.sock?db=3", "redis://u:p@127.0.0.1:{}?db=3"),
        ("http://[::1]:8000/v1?a=b", "http://127.0.0.1:{}/v1?a=b"),
    ],
)
async def test_a_url_keeps_all_but_its_host(url: str, through: str) -> None:
    async with FaultProxy(url) as proxy:
        assert proxy.url == through.format(proxy.port)


@pytest.mark.parametrize(
    "url",
    [
        "https://api",
        "rediss://cache",
        "postgresql://one,two/jobs",
        "postgresql://db/jobs?sslmode=verify-full",
    ],
)
async def test_a_url_that_a_proxy_cannot_stand_for_is_refused(url: str) -> None:
    with pytest.raises(InvalidConfiguration):
        FaultProxy(url)


async def test_connections_are_counted_while_they_are_open(proxy: FaultProxy, server: Server) -> None:
    assert (proxy.connections, proxy.accepted) == (0, 0)
    client = await dial(proxy)
    await client.line()
    assert (proxy.connections, proxy.accepted) == (1, 1)
    await client.close()
    assert await soon(server.heard.get()) == b""
    other = await dial(proxy)
    await other.line()
    assert (proxy.connections, proxy.accepted) == (1, 2)
    await other.close()


async def test_an_end_is_passed_on_and_what_follows_it_still_arrives(client: Client, server: Server) -> None:
    client.send(b"last\n")
    client.writer.write_eof()
    assert await soon(client.reader.read()) == b"last\n"


async def test_a_server_that_is_away_refuses(proxy: FaultProxy) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    async with FaultProxy(f"redis://127.0.0.1:{port}") as dead:
        client = await dial(dead)
        with pytest.raises(ConnectionResetError):
            await client.line()
        await client.close()


async def test_latency_keeps_the_order(proxy: FaultProxy, client: Client) -> None:
    async with proxy.during(Latency(timedelta(milliseconds=1), timedelta(milliseconds=5), seed=1)):
        for number in range(20):
            await expect_echo(client, f"{number}\n".encode())
        lines = [f"{number}\n".encode() for number in range(20)]
        for line in lines:
            client.send(line)
        assert [await client.line() for _ in lines] == lines


async def test_healing_ends_a_delay_that_has_begun(proxy: FaultProxy, client: Client) -> None:
    async with proxy.during(Latency(timedelta(days=1))):
        client.send(b"late\n")
        await soon(proxy.holding(5))
    assert await client.line() == b"late\n"


async def test_drop_closes_old_and_new_connections_in_good_order(
    proxy: FaultProxy, client: Client, server: Server
) -> None:
    async with proxy.during(Drop()):
        assert await client.line() == b""
        assert await soon(server.heard.get()) == b""
        new = await dial(proxy)
        assert await new.line() == b""
        await new.close()
    again = await dial(proxy)
    assert await again.line() == GREETING
    await again.close()


async def test_reset_resets_old_and_new_connections(
    proxy: FaultProxy, client: Client, server: Server
) -> None:
    async with proxy.during(Reset()):
        with pytest.raises(ConnectionResetError):
            await client.line()
        with pytest.raises(ConnectionResetError):
            await soon(server.clients[0].reader.read())
        with pytest.raises(ConnectionResetError):  # while it connects, or when it first reads
            await (await dial(proxy)).line()
    with pytest.raises(ConnectionResetError):
        await client.line()
    again = await dial(proxy)
    assert await again.line() == GREETING
    await again.close()


async def test_a_black_hole_holds_both_ways_until_it_is_healed(
    proxy: FaultProxy, client: Client, server: Server
) -> None:
    async with proxy.during(BlackHole()):
        client.send(b"there\n")
        server.clients[0].send(b"back\n")
        await soon(proxy.holding(len(b"there\nback\n")))
        assert server.heard.empty()
    assert await soon(server.heard.get()) == b"there\n"
    assert [await client.line(), await client.line()] == [b"back\n", b"there\n"]
    assert proxy.held == 0


async def test_a_black_hole_takes_new_connections_and_answers_none(proxy: FaultProxy, server: Server) -> None:
    async with proxy.during(BlackHole()):
        client = await dial(proxy)
        client.send(b"anybody?\n")
        await soon(proxy.holding())
        assert not server.came.is_set()
    assert [await client.line(), await client.line()] == [GREETING, b"anybody?\n"]
    await client.close()


async def test_a_black_hole_swallows_an_end_too(proxy: FaultProxy, client: Client, server: Server) -> None:
    async with proxy.during(BlackHole()):
        await client.close()
        await expect_nothing_to_have_ended(server)
    assert await soon(server.heard.get()) == b""


async def expect_nothing_to_have_ended(server: Server) -> None:
    """A round trip past the proxy: what went through before it has come by now."""
    host, port = server.clients[0].writer.get_extra_info("sockname")
    direct = Client(*await asyncio.open_connection(host, port))
    assert await direct.line() == GREETING
    await expect_echo(direct, b"direct\n")
    assert [server.heard.get_nowait(), server.heard.empty()] == [b"direct\n", True]
    await direct.close()
    assert await soon(server.heard.get()) == b""  # the direct one's own


async def test_what_a_black_hole_holds_is_bounded(proxy: FaultProxy, client: Client) -> None:
    text = b"x" * (LONG - 1) + b"\n"
    async with proxy.during(BlackHole()):
        client.send(text)
        await soon(proxy.holding(200_000))
        assert proxy.held < 1_000_000
        assert client.writer.transport.get_write_buffer_size() > 0
    assert await soon(client.reader.readexactly(LONG)) == text


async def test_half_open_lets_requests_arrive_and_holds_replies(
    proxy: FaultProxy, client: Client, server: Server
) -> None:
    async with proxy.during(HalfOpen()):
        client.send(b"pay\n")
        assert await soon(server.heard.get()) == b"pay\n"
        await soon(proxy.holding())
        pending = asyncio.ensure_future(client.line())
        assert not pending.done()
    assert await pending == b"pay\n"


async def test_one_way_lets_replies_arrive_and_holds_requests(
    proxy: FaultProxy, client: Client, server: Server
) -> None:
    async with proxy.during(OneWay()):
        client.send(b"pay\n")
        await soon(proxy.holding())
        await expect_echo_from(server, client)
        assert server.heard.empty()
    assert await soon(server.heard.get()) == b"pay\n"
    assert await client.line() == b"pay\n"


async def expect_echo_from(server: Server, client: Client) -> None:
    server.clients[0].send(b"news\n")
    assert await client.line() == b"news\n"


async def test_a_truncated_reply_ends_in_a_reset(proxy: FaultProxy, client: Client) -> None:
    async with proxy.during(Truncate(after=6)):
        await expect_echo(client, b"ab\n")
        client.send(b"1234567\n")
        assert await soon(client.reader.readexactly(3)) == b"123"
        with pytest.raises(ConnectionResetError):
            await client.line()
        new = await dial(proxy)
        assert await new.line() == GREETING
        with pytest.raises(ConnectionResetError):
            await new.line()


async def test_a_truncation_counts_from_when_it_began(proxy: FaultProxy, client: Client) -> None:
    for _ in range(3):
        async with proxy.during(Truncate(after=6)):
            await expect_echo(client, b"abcd\n")


async def test_bandwidth_lets_bytes_pass_little_by_little(proxy: FaultProxy, server: Server) -> None:
    client = await dial(proxy)
    await client.line()
    async with proxy.during(Bandwidth(100)):
        server.clients[0].send(b"x" * 10_000 + b"\n")
        assert await soon(client.reader.read(1)) == b"x"
        assert proxy.held > 9_000
    assert await client.line() == b"x" * 9_999 + b"\n"
    await client.close()


async def test_healing_lets_the_rest_pass_at_once(proxy: FaultProxy, client: Client) -> None:
    async with proxy.during(Bandwidth(1)):
        client.send(b"slow\n")
        await soon(proxy.holding(5))
    assert await client.line() == b"slow\n"


async def test_one_fault_takes_the_place_of_another(proxy: FaultProxy, client: Client) -> None:
    proxy.cause(BlackHole())
    client.send(b"held\n")
    await soon(proxy.holding())
    proxy.cause(Latency(timedelta(milliseconds=1)))
    assert proxy.fault == Latency(timedelta(milliseconds=1))
    assert await client.line() == b"held\n"
    proxy.cause(Reset())
    with pytest.raises(ConnectionResetError):
        await client.line()


def test_jitter_is_the_same_for_the_same_seed() -> None:
    def drawn(seed: int) -> list[float]:
        fault = Latency(timedelta(seconds=1), timedelta(seconds=1), seed)
        link = Link()
        link.change(fault)
        return [link.delay(fault) for _ in range(5)]

    assert drawn(1) == drawn(1) != drawn(2)
    assert all(1 <= delay <= 2 for delay in drawn(1))


@pytest.mark.parametrize("fault", [Drop(), Reset(), Truncate(after=5)])
async def test_postgres_is_away_during_a_fault_and_back_when_it_is_healed(
    postgres_url: str, fault: NetworkFault
) -> None:
    async with FaultProxy(postgres_url) as proxy:
        connection = await connect(proxy.url)
        await connection.close()
        async with proxy.during(fault):
            with pytest.raises(StoreUnavailable):
                await connect(proxy.url)
        pool = await open_pool(proxy.url)
        async with pool.acquire() as connection:
            assert await connection.fetchval("SELECT 1") == 1
        await pool.close()


async def test_a_commit_whose_reply_is_lost_has_happened(postgres_url: str) -> None:
    async with FaultProxy(postgres_url) as proxy:
        connection, other = await connect(proxy.url), await connect(postgres_url)
        await connection.execute("CREATE TABLE kept (value int)")
        async with proxy.during(HalfOpen()):
            lost = asyncio.ensure_future(connection.execute("INSERT INTO kept VALUES (7)"))
            await soon(proxy.holding())
            assert await other.fetchval("SELECT value FROM kept") == 7
            proxy.cause(Reset())
            with pytest.raises(Exception, match=r"clos|reset"):
                await lost
        connection.terminate()
        await other.close()


@pytest.mark.parametrize("fault", [Drop(), Reset(), Truncate(after=5)])
async def test_redis_is_away_during_a_fault_and_back_when_it_is_healed(
    redis_url: str, fault: NetworkFault
) -> None:
    async with FaultProxy(redis_url) as proxy:
        redis = Redis(proxy.url)
        await redis.check()
        async with proxy.during(fault):
            with pytest.raises(DispatchUnavailable):
                await redis.check()
        another = Redis(proxy.url)  # which has no reason to let some time pass before it asks again
        await another.check()
        await another.close()
        await redis.close()


async def test_a_redis_call_goes_on_after_a_black_hole(redis_url: str) -> None:
    async with FaultProxy(redis_url) as proxy:
        redis = Redis(proxy.url)
        await redis.check()
        async with proxy.during(BlackHole()):
            pending = asyncio.ensure_future(redis.ring("bell"))
            await soon(proxy.holding())
            assert not pending.done()
        await pending
        assert await redis.wait_for(["bell"], 5)
        await redis.close()
