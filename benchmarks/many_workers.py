"""What a job costs as its slots are spread over more processes."""

from figures import Figure, Pace, middle, progress
from stage import Stage, open_stage

_NAME = "worker processes, 512 slots in all"
_SLOTS = 512
_PROCESSES = (1, 2, 4, 8)
_ROUNDS = 3


async def measure(jobs: int) -> list[Figure]:
    paces: dict[int, Pace] = {}
    async with open_stage() as stage:
        for processes in _PROCESSES:
            paces[processes] = await _run(stage, processes, jobs)
            progress(f"{processes} worker processes: {paces[processes].cpu_ms_per_job:.2f} ms CPU/job")
    return [
        *(Figure(_NAME, f"{count}", pace.cpu_ms_per_job, "ms CPU/job") for count, pace in paces.items()),
        Figure(
            _NAME,
            "8 / 2",
            paces[8].cpu_ms_per_job / paces[2].cpu_ms_per_job,
            "x CPU/job",
            at_most=1.2,
        ),
    ]


async def _run(stage: Stage, processes: int, jobs: int) -> Pace:
    paces: list[Pace] = []
    async with stage.workers(processes, slots=_SLOTS // processes) as workers:
        await stage.run_jobs(jobs)
        for _ in range(_ROUNDS):
            before = [await worker.cpu() for worker in workers]
            seconds = await stage.run_jobs(jobs)
            used = sum([await worker.cpu() for worker in workers]) - sum(before)
            paces.append(Pace(jobs / seconds, 1000 * used / jobs))
    return middle(paces)
