"""The deliveries table: callbacks that wait, are being sent, or have ended."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from headrace_shared.ids import DeliveryId, JobId, Tenant
from headrace_shared.store.pool import Database
from headrace_shared.store.sql import Statements

_SQL = Statements("deliveries.sql")

DeliveryState = Literal["pending", "delivered", "exhausted", "gone"]


@dataclass(frozen=True, slots=True)
class ClaimedDelivery:
    """A callback that the claimer holds until its lease ends."""

    id: DeliveryId
    claim: int
    """The fencing token: each claim of the row raises it."""
    tenant: Tenant
    url: str
    receiver: str
    """Host and port of the URL, as it spells them."""
    payload: str
    """The exact body that is signed and sent."""
    traceparent: str | None
    attempt: int
    """The number of the attempt that is due, from 1."""
    claimed_at: datetime


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """What an attempt came to, and where it leaves its delivery."""

    delivery: ClaimedDelivery
    duration: timedelta
    state: DeliveryState
    delay: timedelta | None = None
    """Until the next attempt, counted from the writing of this one; only while pending."""
    status: int | None = None
    error_class: str | None = None
    snippet: str | None = None


async def claim_deliveries(
    database: Database, *, limit: int, per_receiver: int, in_flight: Mapping[str, int], lease: timedelta
) -> list[ClaimedDelivery]:
    """Take due deliveries, each under a lease that is not renewed.

    Args:
        database: a pool, or a connection.
        limit: rows at most.
        per_receiver: attempts in flight per receiver at most, the caller's present ones included.
        in_flight: the caller's present attempts by receiver.
        lease: after it, the delivery can be claimed again.

    """
    rows = await database.fetch(
        _SQL["claim_deliveries"], limit, per_receiver, list(in_flight), list(in_flight.values()), lease
    )
    return [ClaimedDelivery(**row) for row in rows]


async def record_attempts(database: Database, attempts: Sequence[AttemptRecord]) -> set[DeliveryId]:
    """Write attempts with the states they lead to; return whose claims still held: others change nothing."""
    rows = await database.fetch(
        _SQL["record_attempts"],
        [one.delivery.id for one in attempts],
        [one.delivery.claim for one in attempts],
        [one.delivery.claimed_at for one in attempts],
        [one.duration for one in attempts],
        [one.status for one in attempts],
        [one.error_class for one in attempts],
        [one.snippet for one in attempts],
        [one.state for one in attempts],
        [one.delay for one in attempts],
    )
    return {DeliveryId(row["delivery_id"]) for row in rows}


@dataclass(frozen=True, slots=True)
class MadeAttempt:
    """One attempt at a callback, as it was written down."""

    number: int
    at: datetime
    duration: timedelta
    status: int | None
    error_class: str | None
    snippet: str | None
    """The beginning of what the receiver answered."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """A callback and all attempts at it."""

    id: DeliveryId
    url: str
    event_type: str
    state: DeliveryState
    next_attempt_at: datetime
    created_at: datetime
    ended_at: datetime | None
    attempts: tuple[MadeAttempt, ...]

    @property
    def webhook_id(self) -> str:
        """What the receiver knows it by, the same at every attempt."""
        return f"evt_{self.id.hex}"


async def deliveries_of_job(database: Database, job_id: JobId) -> list[Delivery]:
    """Return a job's callbacks with all attempts at them, oldest first."""
    made: dict[DeliveryId, list[MadeAttempt]] = {}
    for row in await database.fetch(_SQL["attempts_of_job"], job_id):
        fields = dict(row)
        made.setdefault(fields.pop("delivery_id"), []).append(MadeAttempt(**fields))
    return [
        Delivery(
            id=DeliveryId(row["id"]),
            url=row["url"],
            event_type=row["event_type"],
            state=row["state"],
            next_attempt_at=row["next_attempt_at"],
            created_at=row["created_at"],
            ended_at=row["ended_at"],
            attempts=tuple(made.get(DeliveryId(row["id"]), ())),
        )
        for row in await database.fetch(_SQL["deliveries_of_job"], job_id)
    ]
