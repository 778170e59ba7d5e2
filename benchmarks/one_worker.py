"""One worker process beside a bare loop over the SDK that writes each answer to Postgres."""

from child import child
from figures import Figure, Pace, middle, progress
from stage import Stage, open_stage

_NAME = "one worker"
_SLOTS = (64, 500)
_WARM_UP = 500
_ROUNDS = 3


async def measure(jobs: int) -> list[Figure]:
    bare: dict[int, list[Pace]] = {slots: [] for slots in _SLOTS}
    ours: dict[int, list[Pace]] = {slots: [] for slots in _SLOTS}
    async with open_stage() as stage:
        for number in range(_ROUNDS):
            for slots in _SLOTS:
                bare[slots].append(await _bare(stage, slots, jobs))
                ours[slots].append(await _headrace(stage, slots, jobs))
                progress(
                    f"{_NAME}, round {number + 1} of {_ROUNDS}, {slots} at a time: "
                    f"bare loop {bare[slots][-1].jobs_per_second:.0f} jobs/s, "
                    f"Headrace {ours[slots][-1].jobs_per_second:.0f} jobs/s"
                )
        figures = [figure for slots in _SLOTS for figure in _compare(slots, bare[slots], ours[slots])]
        return figures + await _traffic(stage, jobs)


async def _bare(stage: Stage, slots: int, jobs: int) -> Pace:
    async with child("bare_loop.py", slots, _WARM_UP, jobs, environment=stage.environment()) as loop:
        took = await loop.hear()
    return Pace(jobs / float(took["seconds"]), 1000 * float(took["cpu"]) / jobs)


async def _headrace(stage: Stage, slots: int, jobs: int) -> Pace:
    async with stage.workers(1, slots=slots) as (worker,):
        await stage.run_jobs(_WARM_UP)
        before = await worker.cpu()
        seconds = await stage.run_jobs(jobs)
        return Pace(jobs / seconds, 1000 * (await worker.cpu() - before) / jobs)


def _compare(slots: int, bare: list[Pace], ours: list[Pace]) -> list[Figure]:
    name = f"{_NAME}, {slots} at a time"
    loop, headrace = middle(bare), middle(ours)
    return [
        Figure(name, "bare loop", loop.jobs_per_second, "jobs/s"),
        Figure(name, "Headrace", headrace.jobs_per_second, "jobs/s"),
        Figure(
            name,
            "Headrace / bare loop",
            headrace.jobs_per_second / loop.jobs_per_second,
            "x jobs/s",
            at_least=1.5 if slots == max(_SLOTS) else None,
        ),
        Figure(name, "bare loop", loop.cpu_ms_per_job, "ms CPU/job"),
        Figure(name, "Headrace", headrace.cpu_ms_per_job, "ms CPU/job"),
        Figure(name, "Headrace / bare loop", headrace.cpu_ms_per_job / loop.cpu_ms_per_job, "x CPU/job"),
    ]


async def _traffic(stage: Stage, jobs: int) -> list[Figure]:
    """Count over the whole life of a worker, its start and end included."""
    statements, (scripts, commands) = await stage.statements(), await stage.redis_commands()
    async with stage.workers(1, slots=max(_SLOTS)):
        await stage.run_jobs(jobs)
    statements = await stage.statements() - statements
    more_scripts, more_commands = await stage.redis_commands()
    name = f"{_NAME}, traffic"
    return [
        Figure(name, "Postgres statements", statements / jobs, "per job"),
        Figure(name, "Redis scripts", (more_scripts - scripts) / jobs, "per job"),
        Figure(name, "Redis commands, those in scripts too", (more_commands - commands) / jobs, "per job"),
    ]
