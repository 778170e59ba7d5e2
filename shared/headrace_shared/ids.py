"""The ids a job meets on its road, each its own type.

Every id that is made here is a UUIDv7 (RFC 9562): its first 48 bits are the
millisecond of its making, so that ids sort by time and the partitions of the
store can be ranges of ids.
"""

import os
import re
import time
from typing import NewType
from uuid import UUID

JobId = NewType("JobId", UUID)
BatchId = NewType("BatchId", UUID)
DeliveryId = NewType("DeliveryId", UUID)
Tenant = NewType("Tenant", str)
Lane = NewType("Lane", str)
RouteName = NewType("RouteName", str)
WorkerId = NewType("WorkerId", str)
HoldId = NewType("HoldId", str)
Run = NewType("Run", int)
"""The claim counter of a job's row, and its only fencing token."""
CallNumber = NewType("CallNumber", int)
"""The number of a provider call within one run, from 1."""


TENANT_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
"""What a tenant may be called."""

_HOLD_ID = re.compile(rb"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}(:[0-9]{1,9}){2}")


def uuid7() -> UUID:
    """Return a new UUIDv7 of the present millisecond."""
    milliseconds = time.time_ns() // 1_000_000
    tail = int.from_bytes(os.urandom(10), "big")
    value = (milliseconds << 80) | tail
    value = (value & ~(0xF << 76)) | (0x7 << 76)
    value = (value & ~(0x3 << 62)) | (0x2 << 62)
    return UUID(int=value)


def new_job_id() -> JobId:
    return JobId(uuid7())


def hold_id(job: JobId, run: Run, call: CallNumber) -> HoldId:
    """Return the id of the hold that pays for one call: the ledger's own key."""
    return HoldId(f"{job}:{run}:{call}")


def parse_hold_id(member: bytes) -> HoldId | None:
    """Read the id of a hold; None for what is not one."""
    return HoldId(member.decode()) if _HOLD_ID.fullmatch(member) else None
