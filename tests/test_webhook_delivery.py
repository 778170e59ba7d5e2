"""Callbacks get through at least once, on their schedule, and no receiver holds up another."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network

import asyncpg
import pytest

from headrace_shared import webhooks
from headrace_shared.ids import DeliveryId, Tenant, uuid7
from headrace_shared.policy import WebhookPolicy
from headrace_shared.secrets import SecretReference
from headrace_shared.store import deliveries
from headrace_shared.store.pool import Connection, Pool
from headrace_shared.testing.webhook_receiver import WebhookReceiver
from headrace_workers.webhooks.deliverer import MAX_RETRY_AFTER, Deliverer, conclude
from headrace_workers.webhooks.sender import Failed, Sender

pytestmark = pytest.mark.conformance

MASTERS = (b"master key", b"former master key")
TENANT = Tenant("acme")
LOOPBACK = (ip_network("127.0.0.0/8"),)
SOON = timedelta(0)
BODY = '{"type": "job.succeeded", "data": {"name": "Zoë"}}'


@pytest.fixture
def database(pool: Pool) -> Pool:
    return pool


async def enqueue(database: Pool | Connection, *urls: str) -> list[DeliveryId]:
    ids = [DeliveryId(uuid7()) for _ in urls]
    await database.executemany(
        "INSERT INTO headrace.deliveries"
        " (id, job_id, tenant, url, event_type, payload, traceparent, next_attempt_at, created_at)"
        " VALUES ($1, $1, $2, $3, 'job.succeeded', $4, $5, headrace.now(), headrace.now())",
        [
            (id_, TENANT, url, BODY, f"00-{'a' * 32}-{'b' * 16}-01")
            for id_, url in zip(ids, urls, strict=True)
        ],
    )
    return ids


def policy(attempts: int = 3, timeout: timedelta = timedelta(seconds=5)) -> WebhookPolicy:
    secret = SecretReference("env:HEADRACE_WEBHOOK_SECRET")
    return WebhookPolicy(secret=secret, previous_secret=None, timeout=timeout, schedule=(SOON,) * attempts)


@asynccontextmanager
async def delivering(
    database: Pool, policy: WebhookPolicy, *, sender: Sender | None = None, concurrency: int = 50
) -> AsyncGenerator[asyncio.Event]:
    """Run a deliverer, and yield its doorbell."""
    doorbell, stop = asyncio.Event(), asyncio.Event()
    sender = sender or Sender(MASTERS, timeout=policy.timeout, allow_http=True, allowed_networks=LOOPBACK)
    service = Deliverer(
        database,
        sender,
        policy,
        doorbell=doorbell,
        concurrency=concurrency,
        poll=timedelta(milliseconds=20),
        drain=timedelta(milliseconds=100),
    )
    running = asyncio.create_task(service.run(stop))
    try:
        yield doorbell
    finally:
        stop.set()
        await running


def genuine(body: bytes, headers: Mapping[str, str]) -> None:
    for master in MASTERS:
        webhooks.verify(body, headers, webhooks.tenant_secret(master, TENANT))


async def ended(database: Pool | Connection, id_: DeliveryId) -> asyncpg.Record:
    """Wait until a delivery has ended."""
    async with asyncio.timeout(20):
        while True:
            row = await database.fetchrow("SELECT * FROM headrace.deliveries WHERE id = $1", id_)
            assert row is not None
            if row["state"] != "pending":
                return row
            await asyncio.sleep(0.01)


async def attempts(database: Pool, id_: DeliveryId) -> Sequence[asyncpg.Record]:
    return await database.fetch(
        "SELECT number, status, error_class, at, duration FROM headrace.delivery_attempts"
        " WHERE delivery_id = $1 ORDER BY number",
        id_,
    )


async def test_a_callback_arrives_signed_and_is_recorded(database: Pool) -> None:
    async with WebhookReceiver(verify=genuine) as receiver, delivering(database, policy()):
        [id_] = await enqueue(database, receiver.url)
        row = await ended(database, id_)
    [request] = receiver.deliveries
    assert (request.rejected, request.body.decode(), request.id) == (None, BODY, f"evt_{id_.hex}")
    assert request.headers["headrace-attempt"] == "1"
    assert request.headers["traceparent"] == f"00-{'a' * 32}-{'b' * 16}-01"
    assert (row["state"], row["attempts"], row["lease_until"]) == ("delivered", 1, None)
    [attempt] = await attempts(database, id_)
    assert (attempt["number"], attempt["status"], attempt["error_class"]) == (1, 200, None)


async def test_a_failure_is_tried_again_with_the_same_id(database: Pool) -> None:
    async with (
        WebhookReceiver(verify=genuine, statuses=(500, 200)) as receiver,
        delivering(database, policy()),
    ):
        [id_] = await enqueue(database, receiver.url)
        row = await ended(database, id_)
    assert [request.headers["headrace-attempt"] for request in receiver.deliveries] == ["1", "2"]
    assert {request.id for request in receiver.deliveries} == {f"evt_{id_.hex}"}
    assert (row["state"], row["attempts"]) == ("delivered", 2)
    assert [(one["status"], one["error_class"]) for one in await attempts(database, id_)] == [
        (500, "status"),
        (200, None),
    ]


async def test_410_ends_a_delivery_as_gone(database: Pool) -> None:
    async with WebhookReceiver(statuses=(410,)) as receiver, delivering(database, policy()):
        [id_] = await enqueue(database, receiver.url)
        row = await ended(database, id_)
    assert (row["state"], row["attempts"], len(receiver.deliveries)) == ("gone", 1, 1)


async def test_a_delivery_is_exhausted_with_its_schedule(database: Pool) -> None:
    async with WebhookReceiver(statuses=(503,)) as receiver, delivering(database, policy(attempts=3)):
        [id_] = await enqueue(database, receiver.url)
        row = await ended(database, id_)
    assert (row["state"], row["attempts"], len(receiver.deliveries)) == ("exhausted", 3, 3)
    assert [one["number"] for one in await attempts(database, id_)] == [1, 2, 3]


@asynccontextmanager
async def black_hole() -> AsyncGenerator[str]:
    """Yield the URL of a server that accepts and never answers."""
    conversations: list[asyncio.Task[None]] = []

    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            await reader.read()
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        conversations.append(asyncio.create_task(swallow(reader, writer)))

    async with await asyncio.start_server(accept, "127.0.0.1") as server:
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        finally:
            await asyncio.gather(*conversations)


async def test_a_dead_receiver_delays_no_other(database: Pool) -> None:
    """Far more wait for the dead one than there are slots, all due before the others."""
    async with black_hole() as dead, WebhookReceiver() as receiver:
        stuck = await enqueue(database, *[dead] * 300)
        async with delivering(database, policy(timeout=timedelta(seconds=60)), concurrency=20):
            healthy = await enqueue(database, *[receiver.url] * 100)
            rows = [await ended(database, id_) for id_ in healthy]
            assert {row["state"] for row in rows} == {"delivered"}
            leased = "SELECT count(*) FROM headrace.deliveries WHERE id = ANY($1) AND lease_until IS NOT NULL"
            assert await database.fetchval(leased, stuck) == 5
            never = "SELECT count(*) FROM headrace.delivery_attempts WHERE delivery_id = ANY($1)"
            assert await database.fetchval(never, stuck) == 0


async def test_a_lost_claim_writes_nothing(database: Pool) -> None:
    [id_] = await enqueue(database, "https://receiver.example/")
    lease = timedelta(seconds=45)

    async def claim() -> list[deliveries.ClaimedDelivery]:
        return await deliveries.claim_deliveries(
            database, limit=10, per_receiver=5, in_flight={}, lease=lease
        )

    [first] = await claim()
    assert await claim() == []
    await database.execute("UPDATE headrace.clock SET shift = '46 seconds'")
    [second] = await claim()
    assert (first.attempt, second.attempt, second.claim) == (1, 1, first.claim + 1)
    late = deliveries.AttemptRecord(first, timedelta(), "delivered", status=200)
    assert await deliveries.record_attempts(database, [late]) == set()
    assert await attempts(database, id_) == []
    timely = deliveries.AttemptRecord(
        second, timedelta(seconds=1), "pending", timedelta(minutes=5), 500, "status"
    )
    assert await deliveries.record_attempts(database, [late, timely]) == {id_}
    assert await deliveries.record_attempts(database, [timely]) == set(), "it was recorded before"
    assert [one["status"] for one in await attempts(database, id_)] == [500]
    row = await database.fetchrow(
        "SELECT *, headrace.now() AS now FROM headrace.deliveries WHERE id = $1", id_
    )
    assert row is not None
    assert (row["state"], row["attempts"], row["lease_until"]) == ("pending", 1, None)
    assert timedelta(minutes=4) < row["next_attempt_at"] - row["now"] <= timedelta(minutes=5)


async def test_a_deliverer_that_died_leaves_its_deliveries_to_another(database: Pool) -> None:
    """A receiver may then see a callback twice, with one id."""
    async with WebhookReceiver() as receiver:
        [id_] = await enqueue(database, receiver.url)
        [claimed] = await deliveries.claim_deliveries(
            database, limit=1, per_receiver=5, in_flight={}, lease=timedelta(seconds=45)
        )
        async with Sender(MASTERS, allow_http=True, allowed_networks=LOOPBACK) as sender:
            await sender.send(claimed)
        async with delivering(database, policy()):
            await database.execute("UPDATE headrace.clock SET shift = '46 seconds'")
            assert (await ended(database, id_))["state"] == "delivered"
    assert [request.id for request in receiver.deliveries] == [f"evt_{id_.hex}"] * 2


async def test_an_outage_of_the_store_is_waited_out(
    database: Pool, direct_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "headrace_workers.webhooks")
    operator = await asyncpg.connect(direct_url)
    async with WebhookReceiver() as receiver, delivering(database, policy()) as doorbell:
        await operator.execute("ALTER SCHEMA headrace RENAME TO away")
        await operator.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE pid <> pg_backend_pid() AND datname = current_database()"
        )
        async with asyncio.timeout(20):
            while not caplog.records:
                doorbell.set()
                await asyncio.sleep(0.01)
        await operator.execute("ALTER SCHEMA away RENAME TO headrace")
        [id_] = await enqueue(operator, receiver.url)
        assert (await ended(operator, id_))["state"] == "delivered"
    await operator.close()
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


async def test_without_a_signing_secret_deliveries_wait_and_one_warning_says_so(
    database: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    [id_] = await enqueue(database, "https://receiver.example/")
    stop = asyncio.Event()
    running = asyncio.create_task(Deliverer(database, None, policy(), poll=SOON).run(stop))
    await asyncio.sleep(0)  # its first step: the warning, and then nothing but the wait
    assert caplog.records
    stop.set()
    await running
    assert len(caplog.records) == 1
    assert "signing secret" in caplog.text
    assert await attempts(database, id_) == []


@pytest.mark.parametrize(
    ("base", "wish", "least", "most"),
    [
        (timedelta(minutes=5), None, timedelta(minutes=4), timedelta(minutes=6)),
        (timedelta(minutes=5), timedelta(seconds=1), timedelta(minutes=4), timedelta(minutes=6)),
        (timedelta(seconds=5), timedelta(hours=2), timedelta(hours=2), timedelta(hours=2)),
        (timedelta(seconds=5), timedelta(days=365), MAX_RETRY_AFTER, MAX_RETRY_AFTER),
    ],
)
def test_the_next_attempt_keeps_to_the_schedule_and_to_the_wish_of_the_receiver(
    base: timedelta, wish: timedelta | None, least: timedelta, most: timedelta
) -> None:
    claimed = deliveries.ClaimedDelivery(
        id=DeliveryId(uuid7()),
        claim=1,
        tenant=TENANT,
        url="https://receiver.example/",
        receiver="receiver.example",
        payload=BODY,
        traceparent=None,
        attempt=1,
        claimed_at=datetime.now(UTC),
    )
    delays = [
        conclude(claimed, Failed("status", 429, wish), timedelta(), (SOON, base)).delay for _ in range(100)
    ]
    assert all(delay is not None and least <= delay <= most for delay in delays)
    assert (len(set(delays)) > 1) is (least != most), "jitter"
