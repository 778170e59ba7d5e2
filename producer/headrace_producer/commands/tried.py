"""The attempts at a job, and who was called in each."""

from collections.abc import Sequence

from headrace_shared.store.jobs import Attempt


def tried_lines(attempts: Sequence[Attempt]) -> list[str]:
    """Return a line for each attempt."""
    return [f"  {one.number}. {_target_of(one)}: {one.error_class or one.outcome}" for one in attempts]


def tried_row(attempt: Attempt) -> dict[str, object]:
    return {
        "run": attempt.run,
        "number": attempt.number,
        "outcome": attempt.outcome,
        "provider": attempt.provider,
        "model": attempt.model,
        "error_class": attempt.error_class,
        "error": attempt.error,
        "ended_at": attempt.ended_at.isoformat(),
    }


def _target_of(attempt: Attempt) -> str:
    return f"{attempt.provider}/{attempt.model}" if attempt.provider else "nobody was called"
