"""A job whose answer is in the journal already is finished from it; nothing is paid twice."""

from headrace_shared.outcome import Succeeded
from headrace_workers.execution import Run


class Guard:
    """Such an answer came after its run had lost the row: it was booked, and ended nothing."""

    async def __call__(self, run: Run) -> Run:
        return run if run.job.answer is None else run.ended(Succeeded())
