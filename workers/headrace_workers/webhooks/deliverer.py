"""The service that takes due callbacks from the store, sends them, and writes down what came of it.

One loop holds the conversation with the store: it writes all attempts that have ended
since its last turn in one statement, then claims as many deliveries as there are free
slots. What waits for a receiver never waits in a slot.
"""

import asyncio
import contextlib
import logging
import random
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from typing import assert_never

import asyncpg

from headrace_shared.logs import Occasional
from headrace_shared.policy import WebhookPolicy
from headrace_shared.store.deliveries import (
    AttemptRecord,
    ClaimedDelivery,
    DeliveryState,
    claim_deliveries,
    record_attempts,
)
from headrace_shared.store.pool import Database
from headrace_shared.telemetry import CallbackSpan, callback_span
from headrace_workers.telemetry import Metrics
from headrace_workers.webhooks.sender import Delivered, Failed, Gone, Outcome, Sender

MAX_RETRY_AFTER = timedelta(hours=24)
JITTER = 0.2

_STORE_TIMEOUT = 10.0
_MAX_BACKOFF = 5.0
_STORE_ERRORS = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # what a connection may say that the server has just closed
    OSError,
    TimeoutError,
)

_logger = logging.getLogger(__name__)
_occasionally = Occasional(_logger)
_random = random.SystemRandom()


class Deliverer:
    """Delivers callbacks until it is told to stop.

    Args:
        database: its outages are waited out.
        sender: None when there is no signing secret: deliveries then stay pending.
        policy: when to try again, and how often.
        metrics: counts the attempts.
        doorbell: set by whoever knows of a new delivery; without it, `poll` finds it.
        concurrency: attempts in flight.
        per_receiver: attempts in flight to one host and port, so that a slow one holds up no other.
        poll: how often the store is asked when the doorbell is silent.
        drain: how long attempts in flight may go on after the stop.
        margin: what a claim lasts longer than an attempt may take: the time to write it down.

    """

    def __init__(
        self,
        database: Database,
        sender: Sender | None,
        policy: WebhookPolicy,
        *,
        doorbell: asyncio.Event | None = None,
        metrics: Metrics | None = None,
        concurrency: int = 200,
        per_receiver: int = 5,
        poll: timedelta = timedelta(seconds=1),
        drain: timedelta = timedelta(seconds=5),
        margin: timedelta = timedelta(seconds=30),
    ) -> None:
        self._database = database
        self._sender = sender
        self._policy = policy
        self._doorbell = doorbell or asyncio.Event()
        self._metrics = metrics or Metrics(enabled=False)
        self._concurrency = concurrency
        self._per_receiver = per_receiver
        self._poll = poll.total_seconds()
        self._drain_seconds = drain.total_seconds()
        self._margin = margin
        self._sending: dict[asyncio.Task[AttemptRecord], ClaimedDelivery] = {}
        self._made: list[AttemptRecord] = []
        self._failures = 0

    async def run(self, stop: asyncio.Event) -> None:
        """Deliver until `stop` is set; then give attempts in flight the `drain` to end."""
        if self._sender is None:
            _logger.warning(
                "callbacks are not sent: no webhook signing secret is configured; they stay pending"
            )
            await stop.wait()
            return
        watch = asyncio.create_task(stop.wait(), name="webhooks-stop")
        watch.add_done_callback(lambda _: self._doorbell.set())
        async with self._sender:
            try:
                while not stop.is_set():
                    self._doorbell.clear()
                    await self._turn(self._sender)
                    await self._rest(stop)
            finally:
                watch.cancel()
                await self._drain(self._drain_seconds if stop.is_set() else 0)

    async def _turn(self, sender: Sender) -> None:
        try:
            async with asyncio.timeout(_STORE_TIMEOUT):
                await self._record()
                claimed = await self._claim()
        except _STORE_ERRORS as error:
            if not self._failures:
                _logger.warning("callbacks wait for PostgreSQL: %s", str(error) or type(error).__name__)
            self._failures += 1
            return
        if self._failures:
            _logger.info("callbacks go on after %d failed turns", self._failures)
            self._failures = 0
        for delivery in claimed:
            self._start(sender, delivery)

    async def _rest(self, stop: asyncio.Event) -> None:
        """Wait for work, or out the backoff of an outage, whatever rings meanwhile."""
        backoff = min(_MAX_BACKOFF, 0.05 * 2.0 ** min(self._failures, 10)) * _random.uniform(0.5, 1)
        bell, seconds = (stop, backoff) if self._failures else (self._doorbell, self._poll)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await bell.wait()

    async def _record(self) -> None:
        batch = list(self._made)
        if not batch:
            return
        held = await record_attempts(self._database, batch)
        del self._made[: len(batch)]  # attempts that ended meanwhile stand behind these
        for attempt in batch:
            if attempt.delivery.id not in held:
                _logger.info(
                    "delivery %s: the claim had ended before its attempt was recorded", attempt.delivery.id
                )

    async def _claim(self) -> list[ClaimedDelivery]:
        free = self._concurrency - len(self._sending) - len(self._made)
        if free <= 0:
            return []
        return await claim_deliveries(
            self._database,
            limit=free,
            per_receiver=self._per_receiver,
            in_flight=Counter(delivery.receiver for delivery in self._sending.values()),
            lease=self._policy.timeout + self._margin,
        )

    def _start(self, sender: Sender, delivery: ClaimedDelivery) -> None:
        task = asyncio.create_task(self._attempt(sender, delivery), name=f"webhook-{delivery.id}")
        self._sending[task] = delivery
        task.add_done_callback(self._ended)

    async def _attempt(self, sender: Sender, delivery: ClaimedDelivery) -> AttemptRecord:
        began = asyncio.get_running_loop().time()
        with callback_span(delivery) as span:
            outcome = await sender.send(replace(delivery, traceparent=span.traceparent))
            _describe(outcome, span)
        duration = timedelta(seconds=asyncio.get_running_loop().time() - began)
        self._metrics.callback_ended(_name(outcome), duration)
        return conclude(delivery, outcome, duration, self._policy.schedule)

    def _ended(self, task: asyncio.Task[AttemptRecord]) -> None:
        delivery = self._sending.pop(task)
        self._doorbell.set()
        if task.cancelled():
            return
        if error := task.exception():
            # Once in a while with its stack: what breaks one attempt may break each of thousands.
            _occasionally.error("an attempt of delivery %s broke", delivery.id, exc_info=error)
            record = conclude(delivery, Failed("internal"), timedelta(), self._policy.schedule)
        else:
            record = task.result()
        self._made.append(record)

    async def _drain(self, seconds: float) -> None:
        """Write what has ended; what has not is another deliverer's, once its lease ends."""
        if self._sending:
            _, late = await asyncio.wait(self._sending, timeout=seconds)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        try:
            async with asyncio.timeout(_STORE_TIMEOUT):
                await self._record()
        except _STORE_ERRORS as error:
            _logger.warning("%d attempts of callbacks were not recorded: %s", len(self._made), error)


def _name(outcome: Outcome) -> str:
    match outcome:
        case Delivered():
            return "delivered"
        case Gone():
            return "gone"
        case Failed(error_class):
            return error_class


def _describe(outcome: Outcome, span: CallbackSpan) -> None:
    match outcome:
        case Delivered(status):
            span.answered(status)
        case Gone(status):
            span.failed("gone", status=status)
        case Failed(error_class, status):
            span.failed(error_class, status=status)


def conclude(
    delivery: ClaimedDelivery, outcome: Outcome, duration: timedelta, schedule: tuple[timedelta, ...]
) -> AttemptRecord:
    """Say where an attempt leaves its delivery.

    Args:
        delivery: of the attempt.
        outcome: how the attempt ended.
        duration: of the attempt.
        schedule: the wait before each attempt, the first included.

    """
    match outcome:
        case Delivered(status):
            return AttemptRecord(delivery, duration, "delivered", status=status)
        case Gone(status):
            return AttemptRecord(delivery, duration, "gone", status=status, error_class="gone")
        case Failed(error_class, status, retry_after, snippet):
            state: DeliveryState = "pending" if delivery.attempt < len(schedule) else "exhausted"
            delay = _delay(schedule[delivery.attempt], retry_after) if state == "pending" else None
            return AttemptRecord(delivery, duration, state, delay, status, error_class, snippet)
        case _:
            assert_never(outcome)


def _delay(base: timedelta, retry_after: timedelta | None) -> timedelta:
    """The scheduled wait give or take a fifth, or the longer one the receiver asks for, up to a day."""
    jittered = base * _random.uniform(1 - JITTER, 1 + JITTER)
    return max(jittered, min(retry_after or timedelta(), MAX_RETRY_AFTER))
