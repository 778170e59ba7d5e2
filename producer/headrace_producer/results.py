"""What a job came to, as its caller sees it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from pydantic import BaseModel

from headrace_shared.errors import JobCancelled, JobExpired, JobFailed
from headrace_shared.ids import JobId
from headrace_shared.job import Bill, Ending, JobState
from headrace_shared.jsonvalue import is_table
from headrace_shared.money import NanoUSD, to_usd

M = TypeVar("M", bound=BaseModel)


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
    """The answer of a job that succeeded, or what its handler returned."""

    job_id: JobId
    status: int | None
    """The provider's HTTP status; None where a handler returned the result."""
    body: Mapping[str, object]
    """The answer, parsed."""
    raw: bytes = field(repr=False)
    """The answer, byte for byte as the provider sent it, or the JSON of what a handler returned."""
    usage: JobUsage
    attempts: int
    """The one that succeeded included."""
    model: str | None
    provider: str | None
    """Like the model, None where a handler returned the result: its calls may have had several."""
    request_id: str | None
    """The provider's own name for the call."""
    answered_by: JobId | None = None
    """The identical job that made the call and bears its cost; None where it was this one."""

    def parse(self, model: type[M]) -> M:
        """Return the result as a pydantic model, such as a handler's.

        Raises:
            pydantic.ValidationError: it is none.

        """
        return model.model_validate_json(self.raw)


def result_of(ending: Ending) -> JobResult:
    """Return the result of a job that has ended.

    Raises:
        JobFailed: it has none; JobCancelled and JobExpired are kinds of it.

    """
    job, answer = ending.job, ending.answer
    raw = ending.output if answer is None else answer.body
    if job.state is not JobState.SUCCEEDED or raw is None:
        kinds = {JobState.CANCELLED: JobCancelled, JobState.EXPIRED: JobExpired}
        kind = kinds.get(job.state, JobFailed)
        raise kind(job_id=job.id, error_class=job.error_class or "", error=job.error or "")
    return JobResult(
        job_id=job.id,
        status=answer.status if answer else None,
        body=_parse(raw),
        raw=raw,
        usage=_usage(ending.bill),
        attempts=job.attempts + 1,
        model=answer.model if answer else None,
        provider=answer.provider if answer else None,
        request_id=answer.request_id if answer else None,
        answered_by=ending.answered_by,
    )


def _usage(bill: Bill) -> JobUsage:
    used = bill.usage
    return JobUsage(
        used.prompt_tokens, used.cached_tokens, used.completion_tokens, used.reasoning_tokens, bill.cost
    )


def _parse(raw: bytes) -> Mapping[str, object]:
    value: object = json.loads(raw)
    return value if is_table(value) else {}
