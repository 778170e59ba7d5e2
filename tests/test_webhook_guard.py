"""A callback never reaches inside the network, however its address is spelled or changes."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Network, ip_network
from typing import cast

import httpcore2
import pytest
import uvloop

from headrace_shared import errors
from headrace_shared.ids import DeliveryId, Tenant, uuid7
from headrace_shared.networks import NOT_PUBLIC, may_reach, parse_address
from headrace_shared.store.deliveries import ClaimedDelivery
from headrace_workers.webhooks.guard import Guard, Resolver
from headrace_workers.webhooks.sender import Delivered, Failed, Sender

LOOPBACK = (ip_network("127.0.0.0/8"),)
MASTERS = (b"master key",)


@dataclass
class Listener:
    """A real listening socket that counts who comes, and answers with what it is told."""

    answer: bytes = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"
    accepts: int = 0
    requests: list[bytes] = field(default_factory=list[bytes])
    port: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepts += 1
        self.requests.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(self.answer)
        await writer.drain()


@asynccontextmanager
async def serving(
    handle: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncGenerator[int]:
    """Yield the port of a server whose every connection has ended when this has."""
    conversations: list[asyncio.Task[None]] = []

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            await handle(reader, writer)
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        conversations.append(asyncio.create_task(converse(reader, writer)))

    async with await asyncio.start_server(accept, "127.0.0.1") as server:
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            await asyncio.gather(*conversations)


@asynccontextmanager
async def listening(listener: Listener) -> AsyncGenerator[Listener]:
    async with serving(listener.serve) as listener.port:
        yield listener


@pytest.fixture
async def listener() -> AsyncIterator[Listener]:
    async with listening(Listener()) as listener:
        yield listener


def answering(*answers: str) -> Resolver:
    async def resolve(host: str, port: int) -> list[str]:
        return list(answers)

    return resolve


def changing(answers: Iterator[str]) -> Resolver:
    async def resolve(host: str, port: int) -> list[str]:
        return [next(answers)]

    return resolve


def delivery(url: str) -> ClaimedDelivery:
    return ClaimedDelivery(
        id=DeliveryId(uuid7()),
        claim=1,
        tenant=Tenant("acme"),
        url=url,
        receiver="receiver",
        payload="{}",
        traceparent=None,
        attempt=1,
        claimed_at=datetime.now(UTC),
    )


async def fetch(guard: Guard, url: str) -> int:
    async with httpcore2.AsyncConnectionPool(network_backend=guard) as pool:
        return (await pool.request("GET", url)).status


@pytest.mark.parametrize(
    "host",
    ["localhost", "127.0.0.1", "127.1", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]", "0.0.0.0", "0"],  # noqa: S104
)
async def test_no_spelling_of_loopback_is_dialled(listener: Listener, host: str) -> None:
    with pytest.raises(errors.WebhookRefused):
        await fetch(Guard(), f"http://{host}:{listener.port}/")
    assert listener.accepts == 0


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1", "2130706433", "[::ffff:127.0.0.1]"])
async def test_an_allowed_network_is_dialled_in_every_spelling(listener: Listener, host: str) -> None:
    allowed = (*LOOPBACK, ip_network("::1/128"))  # what localhost may also stand for
    assert await fetch(Guard(allowed_networks=allowed), f"http://{host}:{listener.port}/") == 200
    assert listener.accepts == 1


@pytest.mark.parametrize(
    "answers",
    [
        ["127.0.0.1"],
        ["8.8.8.8", "127.0.0.1"],
        ["64:ff9b::7f00:1"],
        ["2002:7f00:1::"],
        ["::127.0.0.1"],
        ["fe80::1%eth0"],
        ["::1%lo"],
        ["not an address"],
    ],
)
async def test_one_forbidden_answer_of_the_resolver_refuses_them_all(
    listener: Listener, answers: list[str]
) -> None:
    with pytest.raises(errors.WebhookRefused):
        await fetch(Guard(resolve=answering(*answers)), f"http://receiver.example:{listener.port}/")
    assert listener.accepts == 0


async def test_a_name_that_is_bound_anew_is_judged_by_the_answer_that_is_dialled(listener: Listener) -> None:
    answers = iter(["127.0.0.1", "127.0.0.2"])
    guard = Guard(resolve=changing(answers), allowed_networks=(ip_network("127.0.0.1/32"),))
    assert await fetch(guard, f"http://receiver.example:{listener.port}/") == 200
    with pytest.raises(errors.WebhookRefused):
        await fetch(guard, f"http://receiver.example:{listener.port}/")
    assert next(answers, "none") == "none"
    assert listener.accepts == 1
    assert f"host: receiver.example:{listener.port}" in listener.requests[0].decode().lower()


async def test_the_next_address_is_dialled_when_the_first_does_not_answer(listener: Listener) -> None:
    guard = Guard(resolve=answering("127.0.0.2", "127.0.0.1"), allowed_networks=LOOPBACK)
    assert await fetch(guard, f"http://receiver.example:{listener.port}/") == 200


async def test_a_unix_socket_is_refused() -> None:
    with pytest.raises(errors.WebhookRefused):
        await Guard().connect_unix_socket("/run/some.sock")


async def test_the_pool_dials_through_the_guard_alone(
    monkeypatch: pytest.MonkeyPatch, listener: Listener
) -> None:
    """Fails when httpcore2 stops asking the backend it was given, or learns to read proxy variables."""
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{listener.port}")
    monkeypatch.setenv("ALL_PROXY", f"http://127.0.0.1:{listener.port}")
    asked: list[str] = []

    async def resolve(host: str, port: int) -> list[str]:
        asked.append(f"{host}:{port}")
        return ["10.0.0.1"]

    async with Sender(MASTERS, allow_http=True, resolve=resolve) as sender:
        assert await sender.send(delivery("http://receiver.example/")) == Failed("unreachable")
    assert asked == ["receiver.example:80"]
    assert listener.accepts == 0


async def test_a_tenant_cannot_tell_refused_from_closed_from_unknown(listener: Listener) -> None:
    async def unknown(host: str, port: int) -> list[str]:
        raise httpcore2.ConnectError

    cases: list[tuple[Resolver, tuple[IPv4Network, ...]]] = [
        (answering("127.0.0.1"), ()),
        (answering("127.0.0.1"), (IPv4Network("127.0.0.0/8"),)),
        (unknown, ()),
    ]
    async with listening(Listener()) as closed:
        pass
    for resolve, allowed in cases:
        async with Sender(MASTERS, allow_http=True, allowed_networks=allowed, resolve=resolve) as sender:
            outcome = await sender.send(delivery(f"http://receiver.example:{closed.port}/"))
        assert outcome == Failed("unreachable")


async def test_a_redirect_into_the_network_is_a_failure_and_not_followed(listener: Listener) -> None:
    location = f"http://127.0.0.1:{listener.port}/".encode()
    redirect = Listener(b"HTTP/1.1 302 Found\r\nlocation: " + location + b"\r\ncontent-length: 0\r\n\r\n")
    async with (
        listening(redirect),
        Sender(MASTERS, allow_http=True, allowed_networks=LOOPBACK) as sender,
    ):
        outcome = await sender.send(delivery(f"http://127.0.0.1:{redirect.port}/"))
    assert outcome == Failed("redirect", 302, snippet="")
    assert (redirect.accepts, listener.accepts) == (1, 0)


async def test_of_an_answer_of_a_gigabyte_little_is_taken() -> None:
    sent = 0

    async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 500 Oops\r\ncontent-length: 1000000000\r\n\r\n")
        while sent < 1_000_000_000:
            writer.write(b"\x00x" * 50_000)
            await writer.drain()
            sent += 100_000

    async with serving(pour) as port, Sender(MASTERS, allow_http=True, allowed_networks=LOOPBACK) as sender:
        outcome = await sender.send(delivery(f"http://127.0.0.1:{port}/"))
    assert outcome == Failed("status", 500, snippet="\ufffdx" * 250)
    assert sent < 20_000_000, "what the buffers of two sockets hold"


@pytest.mark.parametrize("wish", ["120", "Mon, 05 Oct 2026 12:02:00 GMT"])
async def test_the_wish_of_retry_after_is_read_in_both_forms(listener: Listener, wish: str) -> None:
    listener.answer = (
        "HTTP/1.1 429 Slow\r\ndate: Mon, 05 Oct 2026 12:00:00 GMT\r\n"
        f"retry-after: {wish}\r\ncontent-length: 0\r\n\r\n"
    ).encode()
    async with Sender(MASTERS, allow_http=True, allowed_networks=LOOPBACK) as sender:
        outcome = await sender.send(delivery(f"http://127.0.0.1:{listener.port}/"))
    assert outcome == Failed("status", 429, timedelta(minutes=2), "")


async def test_an_answer_that_drips_ends_at_the_deadline() -> None:
    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n")
        while True:  # each byte in time for a read timeout
            writer.write(b".")
            await writer.drain()
            await asyncio.sleep(0.005)

    deadline = timedelta(milliseconds=200)
    async with (
        serving(drip) as port,
        Sender(MASTERS, timeout=deadline, allow_http=True, allowed_networks=LOOPBACK) as sender,
    ):
        assert await sender.send(delivery(f"http://127.0.0.1:{port}/")) == Failed("timeout")


async def test_an_answer_that_breaks_off_is_told_apart(listener: Listener) -> None:
    listener.answer = b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf"
    async with Sender(MASTERS, allow_http=True, allowed_networks=LOOPBACK) as sender:
        assert await sender.send(delivery(f"http://127.0.0.1:{listener.port}/")) == Failed("broken")


async def test_a_connection_that_is_reset_at_once_is_told_apart(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = cast("httpcore2.AsyncNetworkBackend", httpcore2.AnyIOBackend())

    class Resetting(httpcore2.AsyncNetworkBackend):
        async def connect_tcp(
            self,
            host: str,
            port: int,
            timeout: float | None = None,
            local_address: str | None = None,
            socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
        ) -> httpcore2.AsyncNetworkStream:
            stream = await network.connect_tcp(host, port, timeout, local_address, socket_options)
            await stream.aclose()
            return stream

    async def send() -> object:
        async with Sender(MASTERS, allow_http=True, allowed_networks=LOOPBACK) as sender:
            return await sender.send(delivery(f"http://127.0.0.1:{listener.port}/"))

    def in_the_loop_of_a_worker() -> object:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(send())

    monkeypatch.setattr(httpcore2, "AnyIOBackend", Resetting)
    assert await asyncio.to_thread(in_the_loop_of_a_worker) == Failed("unreachable")


async def test_a_failed_handshake_is_told_apart() -> None:
    async def speak_plainly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await reader.read()

    async with serving(speak_plainly) as port, Sender(MASTERS, allowed_networks=LOOPBACK) as sender:
        assert await sender.send(delivery(f"https://127.0.0.1:{port}/")) == Failed("tls")


@pytest.mark.parametrize("masters", [(), (b"",), (b"master key", b"")])
async def test_an_empty_key_signs_nothing(masters: tuple[bytes, ...]) -> None:
    with pytest.raises(errors.InvalidConfiguration):
        Sender(masters)


async def test_the_request_carries_the_contract(listener: Listener) -> None:
    async with Sender(MASTERS, allow_http=True, allowed_networks=LOOPBACK) as sender:
        assert await sender.send(delivery(f"http://127.0.0.1:{listener.port}/hook?a=b")) == Delivered(200)
    head = listener.requests[0].decode().lower()
    assert head.startswith("post /hook?a=b http/1.1")
    for line in ("accept-encoding: identity", "content-type: application/json", "headrace-attempt: 1"):
        assert line in head


def test_every_network_of_the_list_is_refused_at_both_ends() -> None:
    for network in NOT_PUBLIC:
        for address in (network[0], network[-1]):
            assert not may_reach(address), address


@pytest.mark.parametrize(
    "text", ["8.8.8.8", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "::ffff:8.8.8.8"]
)
def test_public_addresses_may_be_reached(text: str) -> None:
    address = parse_address(text)
    assert address is not None
    assert may_reach(address)
