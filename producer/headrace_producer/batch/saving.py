"""The second reading of a file: its lines become jobs, those that are none yet."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from headrace_producer.batch.files import BatchFile
from headrace_producer.batch.lines import Draft, Format, longest_line
from headrace_producer.checking import Checker, JobRequest
from headrace_producer.connections import Connections
from headrace_producer.in_force import InForce, Snapshot
from headrace_producer.timing import AT_ONCE, Timing
from headrace_shared.dispatch.dispatch import Entry
from headrace_shared.errors import InvalidInput, StoreError
from headrace_shared.ids import BatchId, Tenant
from headrace_shared.job import BatchLine, NewJob
from headrace_shared.jsonvalue import write_json
from headrace_shared.store.batches import known_lines
from headrace_shared.store.jobs import Inserted, insert_jobs

CHUNK = 1000
"""Jobs in one statement."""

CHUNK_BYTES = 4 << 20
"""Bodies in one statement, unless a single one is longer."""

_TRIES = 5


@dataclass(frozen=True, slots=True)
class Purpose:
    """What all lines of a batch become."""

    batch_id: BatchId
    tenant: Tenant
    lane: str
    webhook: str | None
    timing: Timing = AT_ONCE
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Line:
    number: int
    custom_id: str
    url: str
    body: bytes


class LineSaver:
    """Saves the lines of one batch, each once however often it is tried."""

    def __init__(self, connections: Connections, in_force: InForce, purpose: Purpose) -> None:
        self._connections = connections
        self._in_force = in_force
        self._purpose = purpose
        self._checker = Checker(purpose.tenant, connections.settings)

    async def save(self, lines: Sequence[Line]) -> int:
        """Save those of the lines that have no job yet; return how many that were.

        Raises:
            InvalidInput: a line is refused by a configuration that is newer than its check.
            StoreError: the configuration changes all the time.

        """
        batch_id, pool = self._purpose.batch_id, self._connections.pool
        known = await known_lines(pool, batch_id, lines[0].number, lines[-1].number)
        missing = [line for line in lines if line.number not in known]
        snapshot = await self._in_force.now()
        for _ in range(_TRIES if missing else 0):
            jobs = [self._job(line, snapshot) for line in missing]
            async with pool.acquire() as connection, connection.transaction():
                keep_keys = snapshot.configuration.defaults.idempotency
                saved = await insert_jobs(
                    connection, jobs, configuration=snapshot.version, keep_keys=keep_keys
                )
            if saved is not None:
                return await self._announce(jobs, saved)
            snapshot = await self._in_force.after(snapshot)
        if missing:
            raise StoreError(reason="the configuration changes faster than jobs can be checked; try again")
        return 0

    def _job(self, line: Line, snapshot: Snapshot) -> NewJob:
        purpose = self._purpose
        request = JobRequest(
            line.url,
            line.body,
            lane=purpose.lane,
            webhook=purpose.webhook,
            idempotency_key=f"batch:{purpose.batch_id}:{line.number}",
            ttl=purpose.timing.ttl,
            deadline=purpose.timing.deadline,
            timeout=purpose.timing.timeout,
            tags=purpose.tags,
        )
        try:
            job = self._checker.check(request, snapshot, None)
        except InvalidInput as error:
            raise InvalidInput(reason=f"line {line.number}: {error.message}") from None
        return replace(job, batch_line=BatchLine(purpose.batch_id, line.number, line.custom_id))

    async def _announce(self, jobs: Sequence[NewJob], saved: Sequence[Inserted]) -> int:
        entries = [
            (Entry(job.queue, job.id), inserted.due_in)
            for job, inserted in zip(jobs, saved, strict=True)
            if not inserted.existed
        ]
        await self._connections.announcer.enqueued(entries)
        return len(entries)


def read_chunks(
    file: BatchFile, form: Format, snapshot: Snapshot, only: frozenset[int]
) -> Iterator[Sequence[Line]]:
    """Read a file in chunks that fit into one statement; `only` chooses lines when it is not empty."""
    chunk: list[Line] = []
    size = 0
    for found in form.drafts(file, longest=longest_line(snapshot)):
        if not isinstance(found, tuple) or (only and found[0] not in only):
            continue
        line = _line(*found)
        if chunk and (len(chunk) >= CHUNK or size + len(line.body) > CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(line)
        size += len(line.body)
    if chunk:
        yield chunk


def _line(number: int, draft: Draft) -> Line:
    return Line(number, draft.custom_id, draft.url, write_json(draft.body))
