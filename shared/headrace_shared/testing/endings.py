"""Jobs that are ended in the store as a worker would end them, without a worker or a provider."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from headrace_shared.ids import CallNumber, JobId, WorkerId, hold_id
from headrace_shared.job import ClaimedJob
from headrace_shared.money import ZERO, NanoUSD
from headrace_shared.outcome import ErrorClass, Failed, Failure, Outcome, Succeeded
from headrace_shared.store import claims, money, runs
from headrace_shared.store.pool import Pool
from headrace_shared.usage import NO_USAGE, Usage

WORKER = WorkerId("a-test")
LEASE = timedelta(minutes=1)
HELD = NanoUSD(10_000)
COST = NanoUSD(1_000)
USAGE = Usage(prompt_tokens=10, cached_tokens=0, completion_tokens=5, reasoning_tokens=0)


@dataclass(frozen=True, slots=True)
class End:
    """How the single call of a job ends, and the job with it."""

    outcome: Outcome
    state: str
    """Of the call: `answered`, `failed` or `suspense`."""
    status: int | None = None
    answer: bytes | None = None
    error_class: ErrorClass | None = None

    @classmethod
    def answered(cls, answer: bytes) -> "End":
        return cls(Succeeded(), "answered", 200, answer)

    @classmethod
    def filtered(cls, answer: bytes) -> "End":
        """Answered and paid for, and a failure all the same."""
        error = ErrorClass.CONTENT_FILTER
        return cls(Failed(Failure(error, "the content filter stopped it")), "answered", 200, answer, error)

    @classmethod
    def refused(cls, status: int, answer: bytes) -> "End":
        error = ErrorClass.BAD_REQUEST
        return cls(Failed(Failure(error, f"refused with {status}")), "failed", status, answer, error)

    @classmethod
    def lost(cls, message: str = "no answer came in time") -> "End":
        error = ErrorClass.TIMEOUT
        return cls(Failed(Failure(error, message)), "suspense", error_class=error)


class Endings:
    """Ends the jobs of one database."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def end_batch(self, batch_id: UUID | str, choose: Callable[[int], End | None]) -> None:
        """End the queued jobs of a batch, each as it is chosen by its line; None leaves it queued."""
        rows = await self._pool.fetch(
            "SELECT id, line FROM headrace.jobs WHERE batch_id = $1 AND state = 'queued' ORDER BY line",
            UUID(str(batch_id)),
        )
        chosen = [(JobId(row["id"]), end) for row in rows if (end := choose(row["line"])) is not None]
        await self.end(chosen)

    async def end(self, chosen: Sequence[tuple[JobId, End]]) -> None:
        """End jobs, each with a call of its own in the ledger."""
        taken = await claims.claim_jobs(self._pool, [job_id for job_id, _ in chosen], WORKER, LEASE)
        ends = dict(chosen)
        now: datetime = await self._pool.fetchval("SELECT headrace.now()")
        intents = [_intent(job, now) for job in taken.jobs]
        await runs.open_calls(self._pool, await money.current_epoch(self._pool), intents)
        await runs.finish(
            self._pool,
            WORKER,
            0,
            conclusions=[_conclusion(job, ends[job.id]) for job in taken.jobs],
            attempts=[],
            ends=[_run_end(job, ends[job.id]) for job in taken.jobs],
        )


def _intent(job: ClaimedJob, now: datetime) -> runs.Intent:
    return runs.Intent(
        job_id=job.id,
        run=job.run,
        call=CallNumber(1),
        provider="openai",
        model=job.queue.route,
        hold_id=hold_id(job.id, job.run, CallNumber(1)),
        held=HELD,
        held_at=now,
        scopes=("global", f"tenant:{job.queue.tenant}"),
        price_version="test",
    )


def _conclusion(job: ClaimedJob, end: End) -> runs.Conclusion:
    is_answered = end.state == "answered"
    return runs.Conclusion(
        job_id=job.id,
        run=job.run,
        call=CallNumber(1),
        state=end.state,
        latency=timedelta(milliseconds=100),
        status=end.status,
        error_class=end.error_class,
        request_id=None if end.status is None else f"req_{job.id.hex[-6:]}",
        usage=USAGE if is_answered else NO_USAGE,
        cost=COST if is_answered else ZERO,
        suspense=HELD if end.state == "suspense" else ZERO,
        answer=end.answer,
    )


def _run_end(job: ClaimedJob, end: End) -> runs.RunEnd:
    failed = isinstance(end.outcome, Failed)
    return runs.RunEnd(
        job.id, job.run, end.outcome, int(failed), None if failed else (job.run, CallNumber(1))
    )
