"""Get leave for calls as a worker does, without making them: `leave_process.py WAVES CALLS`.

In each wave so many calls at once hold their money and are admitted under their limits. Prints the
milliseconds of processor time for each of them, and for what is settled of it afterwards.
"""

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from datetime import timedelta

import uvloop
from stage import body

from headrace_shared.budgets import Settlement
from headrace_shared.ids import WorkerId
from headrace_shared.jsonvalue import write_json
from headrace_shared.money import NanoUSD
from headrace_shared.settings import load_settings
from headrace_shared.testing.jobs import claimed_job
from headrace_shared.usage import Finish, Usage
from headrace_workers.execution import Run, Step
from headrace_workers.parts import Parts, open_parts, steps_of
from headrace_workers.replies import Answered
from headrace_workers.steps.admit import Admit
from headrace_workers.steps.hold import Hold
from headrace_workers.steps.route import Route

_WARM_UP = 10
_SAID = {
    f"x-ratelimit-{what}-{kind}": value
    for kind in ("requests", "tokens")
    for what, value in (("limit", "60000000"), ("remaining", "59990000"), ("reset", "10ms"))
}
_USAGE = Usage(20, 0, 20, 0)


async def main() -> None:
    waves, calls = map(int, sys.argv[1:3])
    async with open_parts(load_settings(), WorkerId("bench")) as parts:
        steps = steps_of(parts)
        route = next(step for step in steps if isinstance(step, Route))
        leave = [step for step in steps if isinstance(step, Hold | Admit)]
        left = settled = 0.0
        for wave in range(-_WARM_UP, waves):
            runs = [await route(Run.of(claimed_job(write_json(body(1))))) for _ in range(calls)]
            _, bare = await _wave(runs, [])
            let, processor = await _wave(runs, leave)
            began = time.process_time()
            await _settle(parts, let)
            if wave >= 0:
                # The tasks would be there without the steps.
                left += processor - bare
                settled += time.process_time() - began
    print(json.dumps({"leave": 1000 * left / waves / calls, "settle": 1000 * settled / waves / calls}))


async def _wave(runs: Sequence[Run], steps: Sequence[Step]) -> tuple[list[Run], float]:
    """Take runs through some steps, all at once; return them with the seconds of processor time."""

    async def through(run: Run) -> Run:
        await asyncio.sleep(0)
        for step in steps:
            run = await step(run)
        return run

    began = time.process_time()
    through_all = await asyncio.gather(*(through(run) for run in runs))
    return through_all, time.process_time() - began


async def _settle(parts: Parts, runs: Sequence[Run]) -> None:
    settlements: list[Settlement] = []
    for run in runs:
        if run.held is None or run.admission is None:
            raise RuntimeError(f"a call got no leave: {run.outcome}")
        answered = Answered(timedelta(0), 200, None, b"", _USAGE, Finish.COMPLETE, limit_headers=_SAID)
        parts.limiter.settle(run.admission, answered)
        settlements.append(Settlement(run.held.id, NanoUSD(1)))
    await parts.limiter.report()
    await parts.budgets.settle(settlements)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
