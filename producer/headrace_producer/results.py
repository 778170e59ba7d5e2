"""What a job came to, as its caller sees it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from headrace_shared.errors import JobCancelled, JobExpired, JobFailed
from headrace_shared.ids import JobId
from headrace_shared.job import Bill, Ending, JobState
from headrace_shared.jsonvalue import is_table
from headrace_shared.money import NanoUSD, to_usd


@dataclass(frozen=True, slots=True)
class JobUsage:
    """What all calls of a job used and cost; calls that are still in suspense are left out."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    cost_nano_usd: NanoUSD

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    @property
    def cost_usd(self) -> float:
        return float(to_usd(self.cost_nano_usd))


@dataclass(frozen=True, slots=True)
class JobResult:
    """The answer of a job that succeeded."""

    job_id: JobId
    status: int
    """The provider's HTTP status."""
    body: Mapping[str, object]
    """The answer, parsed."""
    raw: bytes = field(repr=False)
    """The answer, byte for byte as the provider sent it."""
    usage: JobUsage
    attempts: int
    """The one that succeeded included."""
    model: str
    provider: str
    request_id: str | None
    """The provider's own name for the call."""


def result_of(ending: Ending) -> JobResult:
    """Return the result of a job that has ended.

    Raises:
        JobFailed: it has none; JobCancelled and JobExpired are kinds of it.

    """
    job, answer = ending.job, ending.answer
    if job.state is not JobState.SUCCEEDED or answer is None:
        kinds = {JobState.CANCELLED: JobCancelled, JobState.EXPIRED: JobExpired}
        kind = kinds.get(job.state, JobFailed)
        raise kind(job_id=job.id, error_class=job.error_class or "", error=job.error or "")
    return JobResult(
        job_id=job.id,
        status=answer.status,
        body=_parse(answer.body),
        raw=answer.body,
        usage=_usage(ending.bill),
        attempts=job.attempts + 1,
        model=answer.model,
        provider=answer.provider,
        request_id=answer.request_id,
    )


def _usage(bill: Bill) -> JobUsage:
    used = bill.usage
    return JobUsage(
        used.prompt_tokens, used.cached_tokens, used.completion_tokens, used.reasoning_tokens, bill.cost
    )


def _parse(raw: bytes) -> Mapping[str, object]:
    value: object = json.loads(raw)
    return value if is_table(value) else {}
