"""`headrace failures` and `headrace retry`: what ended without a result, and how it gets another chance."""

import asyncio
import re
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, TypeAlias
from uuid import UUID

import typer

from headrace_producer.batch.progress import Progressing, View
from headrace_producer.checking import Checker, check_tenant
from headrace_producer.commands.options import AsJson, Deadline, read_duration, read_moment
from headrace_producer.connections import Connections, open_connections
from headrace_producer.console import Console, count
from headrace_producer.retrying import Retrier, check_retriable
from headrace_producer.timing import check_ahead
from headrace_shared.errors import AlreadyRetried, InvalidInput, NotRetriable
from headrace_shared.ids import BatchId, JobId
from headrace_shared.outcome import ErrorClass
from headrace_shared.settings import load_settings
from headrace_shared.store import dead_letters
from headrace_shared.store.dead_letters import FailureGroup, Named, Selection

_FINGERPRINT = re.compile(r"[0-9a-f]{12}")
_EXAMPLE_SHOWN = 90

OfTenant: TypeAlias = Annotated[str | None, typer.Option("--tenant", help="Only this tenant's.")]
OfClass: TypeAlias = Annotated[
    str | None, typer.Option("--class", metavar="CLASS", help="Only errors of this class: timeout.")
]
Since: TypeAlias = Annotated[
    str | None, typer.Option("--since", metavar="DURATION", help="Only what ended in this time: 2h.")
]


def failures(
    *,
    tenant: OfTenant = None,
    batch: Annotated[str | None, typer.Option(metavar="ID", help="Only this batch's.")] = None,
    since: Since = None,
    error_class: OfClass = None,
    as_json: AsJson = False,
) -> None:
    """Show the jobs that failed or expired and were not retried, those of one kind together."""
    batches = () if batch is None else (BatchId(_read_id(batch)),)
    selection = _selection(tenant, batches, error_class, None, since)
    asyncio.run(_failures(Console(as_json), selection))


def retry(
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="ID", help="Of jobs, or of batches: what failed in them.")
    ] = None,
    *,
    fingerprint: Annotated[
        str | None, typer.Option(metavar="FINGERPRINT", help="Of a kind that 'headrace failures' shows.")
    ] = None,
    error_class: OfClass = None,
    tenant: OfTenant = None,
    since: Since = None,
    body: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Another request, in JSON, for a single job.")
    ] = None,
    deadline: Deadline = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count what would be retried.")] = False,
    as_json: AsJson = False,
) -> None:
    """Retry jobs that failed or expired: each becomes a new job, and keeps its own ending.

    A cancelled job is retried when it is named itself. Checkpoints of handlers are not taken over.
    """
    named = [_read_id(text) for text in dict.fromkeys(ids or ())]
    selection = _selection(tenant, (), error_class, fingerprint, since)
    if not named and selection.is_empty:
        raise InvalidInput(
            reason="Say what to retry: ids of jobs or batches, --fingerprint, --class, --tenant or --since."
        )
    moment = read_moment("--deadline", deadline)
    check_ahead("--deadline", moment)
    order = _Order(named, selection, _read_body(body), moment, dry_run=dry_run)
    asyncio.run(_retry(Console(as_json), order))


@dataclass(frozen=True, slots=True)
class _Order:
    named: Sequence[UUID]
    selection: Selection
    body: bytes | None
    deadline: datetime | None
    dry_run: bool


def _selection(
    tenant: str | None,
    batches: tuple[BatchId, ...],
    error_class: str | None,
    fingerprint: str | None,
    since: str | None,
) -> Selection:
    if error_class is not None and error_class not in tuple(ErrorClass):
        raise InvalidInput(reason=f"--class: {error_class!r:.64} is not one of {', '.join(ErrorClass)}.")
    if fingerprint is not None and not _FINGERPRINT.fullmatch(fingerprint):
        raise InvalidInput(
            reason=f"--fingerprint: {fingerprint!r:.64} is not one that 'headrace failures' shows."
        )
    return Selection(
        tenant=None if tenant is None else check_tenant(tenant),
        batches=batches,
        error_class=error_class,
        fingerprint=fingerprint,
        since=read_duration("--since", since),
    )


def _read_id(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise InvalidInput(reason=f"{text!r:.64} is not the id of a job or a batch.") from None


def _read_body(path: Path | None) -> bytes | None:
    try:
        return None if path is None else path.read_bytes()
    except OSError as error:
        raise InvalidInput(reason=f"{path} cannot be read: {error.strerror or error}.") from None


async def _failures(console: Console, selection: Selection) -> None:
    async with open_connections(load_settings()) as connections:
        named = await dead_letters.look_up_named(connections.pool, selection.batches)
        if len(named.batches) != len(selection.batches):
            raise InvalidInput(reason=f"--batch: there is no batch {selection.batches[0]}.")
        until = await dead_letters.store_time(connections.pool)
        groups = await dead_letters.failure_groups(connections.pool, selection, until)
    if groups:
        console.table(
            ("fingerprint", "class", "jobs", "first", "last", "a job", "its error"),
            [_cells(group) for group in groups],
        )
        console.say("Retry a kind with 'headrace retry --fingerprint FINGERPRINT'.")
    else:
        console.say("There are no failures that were not retried.")
    total = sum(group.count for group in groups)
    console.conclude({"total": total, "groups": [_as_json(group) for group in groups]})


def _cells(group: FailureGroup) -> list[str]:
    return [
        group.fingerprint,
        group.error_class,
        f"{group.count:,}",
        f"{group.first:%Y-%m-%d %H:%M:%S}",
        f"{group.last:%Y-%m-%d %H:%M:%S}",
        str(group.job_id),
        " ".join(group.example.split())[:_EXAMPLE_SHOWN],
    ]


def _as_json(group: FailureGroup) -> dict[str, object]:
    return {
        "fingerprint": group.fingerprint,
        "class": group.error_class,
        "count": group.count,
        "first": group.first.isoformat(),
        "last": group.last.isoformat(),
        "job_id": str(group.job_id),
        "example": group.example,
    }


async def _retry(console: Console, order: _Order) -> None:
    async with open_connections(load_settings()) as connections:
        chosen = await _choose(console, connections, order)
        if order.body is not None and chosen.total != 1:
            raise InvalidInput(reason=f"--body is the request of one job, and {chosen.total:,} are meant.")
        if order.dry_run:
            console.say(f"{count(chosen.total, 'job')} would be retried.")
            console.conclude({"retried": 0, "would_retry": chosen.total})
            return
        with Progressing() as view:
            new = await _Work(connections, order, chosen, view).do()
    console.say(f"{count(len(new), 'job')} retried{f': {new[0]}' if len(new) == 1 else ''}.")
    console.conclude({"retried": len(new), "job_id": str(new[0]) if len(new) == 1 else None})


@dataclass(frozen=True, slots=True)
class _Chosen:
    jobs: Sequence[JobId]
    """Named ones."""
    selection: Selection | None
    until: datetime
    """What fails later, maybe because of this very retry, is not meant."""
    total: int


async def _choose(console: Console, connections: Connections, order: _Order) -> _Chosen:
    pool = connections.pool
    until = await dead_letters.store_time(pool)
    named = await dead_letters.look_up_named(pool, order.named)
    _refuse_unknown(order, named)
    jobs = _retriable(console, named)
    selection = None
    total = len(jobs)
    if named.batches or not order.named:
        filters = order.selection
        selection = Selection(
            filters.tenant, tuple(named.batches), filters.error_class, filters.fingerprint, filters.since
        )
        total += sum(group.count for group in await dead_letters.failure_groups(pool, selection, until))
    return _Chosen(jobs, selection, until, total)


def _refuse_unknown(order: _Order, named: Named) -> None:
    known = {job.id for job in named.jobs} | set(named.batches)
    for one in order.named:
        if one not in known:
            raise InvalidInput(reason=f"There is no job and no batch {one}.")
    if named.jobs and not order.selection.is_empty:
        raise InvalidInput(reason="A job that is named is retried as it is: leave the other options out.")


def _retriable(console: Console, named: Named) -> list[JobId]:
    """Return the named jobs that can be retried; one that cannot is an error when it is alone."""
    jobs: list[JobId] = []
    for job in named.jobs:
        try:
            check_retriable(job.id, job.state, job.replaced_by)
        except (AlreadyRetried, NotRetriable) as error:
            if len(named.jobs) == 1 and not named.batches:
                raise
            console.note(error.message)
        else:
            jobs.append(job.id)
    return jobs


class _Work:
    """Retries what was chosen, a page at a time."""

    def __init__(self, connections: Connections, order: _Order, chosen: _Chosen, view: View) -> None:
        self._pool = connections.pool
        self._retrier = Retrier(
            connections.pool, Checker("default", connections.settings), connections.announcer
        )
        self._order = order
        self._chosen = chosen
        self._view = view
        self._new: list[JobId] = []

    async def do(self) -> list[JobId]:
        """Return the new jobs."""
        jobs = self._chosen.jobs
        for start in range(0, len(jobs), dead_letters.PAGE):
            await self._retry(jobs[start : start + dead_letters.PAGE])
        if self._chosen.selection is not None:
            found = dead_letters.dead_letters(self._pool, self._chosen.selection, self._chosen.until)
            async with aclosing(found) as pages:
                async for page in pages:
                    await self._retry(page)
        return self._new

    async def _retry(self, ids: Sequence[JobId]) -> None:
        deadline = self._order.deadline
        if self._order.body is not None:
            self._new.append(await self._retrier.retry(ids[0], self._order.body, deadline=deadline))
        else:
            self._new += [one.new for one in await self._retrier.retry_many(ids, deadline=deadline)]
        if self._chosen.total > dead_letters.PAGE:
            self._view.show("Retried", len(self._new), self._chosen.total)
