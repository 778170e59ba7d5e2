"""Suspects: jobs of which two runs lost their worker. Each runs in a process of its own.

What kills that process can only have been the job, so its death condemns the job, and nobody's
neighbour is ever condemned with it. The process outlives this one: it holds its row by itself.
"""

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from headrace_shared.budgets import Budgets
from headrace_shared.dispatch.dispatch import Dispatch, Entry
from headrace_shared.errors import DispatchUnavailable
from headrace_shared.ids import JobId, WorkerId, uuid7
from headrace_shared.settings import Settings
from headrace_shared.store import claims, lost
from headrace_shared.store.pool import UNREACHABLE, Pool

_logger = logging.getLogger(__name__)

MOST = 2
"""Processes that a worker has beside itself at a time; each takes one of its slots."""

COULD_NOT_RUN = 75
"""How such a process ends when it is not the job's doing: its servers are away, its code is broken."""

_GRACE = timedelta(seconds=10)
_PAUSE = 1.0


@dataclass(frozen=True, slots=True)
class _Lone:
    """One process, the job in it, and under which name it claims that."""

    job: JobId
    worker: WorkerId
    process: "subprocess.Popen[bytes]"
    exit: asyncio.Future[int]


class Suspects:
    """The processes that a worker has beside itself.

    Args:
        pool: where the rows are.
        dispatch: where a condemned job's id is taken out.
        budgets: their counters start from the ledger after a death.
        settings: of this worker; the processes have the same, with a single slot.
        worker: this worker; they claim under names that begin with its own.
        look: how often it is looked whether a process has its job; one without is ended in the end.

    """

    def __init__(
        self,
        pool: Pool,
        dispatch: Dispatch,
        budgets: Budgets,
        settings: Settings,
        worker: WorkerId,
        *,
        look: timedelta = timedelta(seconds=30),
    ) -> None:
        self._pool = pool
        self._dispatch = dispatch
        self._budgets = budgets
        self._settings = settings
        self._worker = worker
        self._look = look.total_seconds()
        self._lone: dict[JobId, asyncio.Task[None]] = {}
        self._processes: dict[JobId, _Lone] = {}
        self._stopping = False

    def __len__(self) -> int:
        return len(self._lone)

    def take(self, job_id: JobId, ended: Callable[[], None]) -> bool:
        """Start a process for a job; false when there are enough of them, it has one, or none can be started.

        Args:
            job_id: whose row suspects it.
            ended: called when the process has ended and its slot is free.

        """
        if self._stopping or len(self) >= MOST or job_id in self._lone:
            return False
        try:
            lone = self._start(job_id)
        except OSError as error:
            _logger.warning("no process can be started for job %s: %s", job_id, error)
            return False
        self._processes[job_id] = lone
        task = asyncio.get_running_loop().create_task(self._follow(lone), name=f"suspect-{job_id}")
        self._lone[job_id] = task
        task.add_done_callback(lambda done: self._forget(job_id, done))
        task.add_done_callback(lambda _: ended())
        return True

    async def condemn(self, job_id: JobId, worker: WorkerId, how: str) -> bool:
        """Quarantine a job whose own process was seen to die; false when it is not its run any more."""
        condemned = await lost.quarantine(self._pool, job_id, worker, how)
        if condemned is None:
            return False
        try:
            await self._budgets.rebuild()
            await self._dispatch.finish([(Entry(condemned.queue, condemned.id), None)])
        except (DispatchUnavailable, *UNREACHABLE):
            # The row has it: whoever claims the id finds that it has ended.
            self._budgets.distrust()
        return True

    def stop(self) -> None:
        """Take no more; from now on a process that is killed may be so because its worker stops."""
        self._stopping = True

    async def until_ended(self, timeout: timedelta) -> None:
        """Wait for those that are there, for some time at most."""
        if self._lone:
            await asyncio.wait(list(self._lone.values()), timeout=max(0.0, timeout.total_seconds()))

    def give_back(self) -> None:
        """Tell the processes to put their jobs back at once."""
        for lone in self._processes.values():
            lone.process.terminate()

    async def leave(self) -> None:
        """Wait a moment for those that are giving back; one that does not is left to itself."""
        await self.until_ended(_GRACE)
        for lone in self._processes.values():
            _logger.warning(
                "process %d does not give job %s back and is left alone", lone.process.pid, lone.job
            )
        for task in self._lone.values():
            task.cancel()
        await asyncio.gather(*self._lone.values(), return_exceptions=True)

    def _start(self, job_id: JobId) -> _Lone:
        worker = WorkerId(f"{self._worker}-alone-{uuid7().hex[-6:]}")
        process = subprocess.Popen(  # noqa: S603 - this very interpreter, and two ids
            (sys.executable, "-P", "-m", "headrace_workers.alone", str(job_id), worker),
            env=_environment(self._settings),
            stdin=subprocess.DEVNULL,
            # Ctrl-C is for the worker, which tells it.
            start_new_session=True,
        )
        _logger.info(
            "job %s, whose runs lost their worker twice, runs alone in process %d", job_id, process.pid
        )
        return _Lone(job_id, worker, process, _exit_of(process))

    def _forget(self, job_id: JobId, task: asyncio.Task[None]) -> None:
        del self._lone[job_id], self._processes[job_id]
        if not task.cancelled() and (error := task.exception()) is not None:
            _logger.error("%s was not seen to its end", task.get_name(), exc_info=error)

    async def _follow(self, lone: _Lone) -> None:
        code = await self._exit(lone)
        if code in (0, COULD_NOT_RUN):
            return
        # Whoever stops this worker, or its whole host, stops the processes beside it as well.
        if self._stopping and code in (-signal.SIGTERM, -signal.SIGKILL):
            return
        how = _how(code)
        if await self._condemned(lone, how):
            _logger.error("job %s is quarantined: it ran alone, and its process died (%s)", lone.job, how)
        else:
            _logger.warning("a process for job %s ended before it ran it (%s)", lone.job, how)

    async def _exit(self, lone: _Lone) -> int:
        """Wait for the exit code; end a process that does not run the job, or not any more."""
        idle = 0
        while True:
            done, _ = await asyncio.wait((lone.exit,), timeout=self._look)
            if done:
                return lone.exit.result()
            with contextlib.suppress(*UNREACHABLE):
                idle = 0 if await claims.is_run_by(self._pool, lone.job, lone.worker) else idle + 1
            if idle > 1:
                _logger.warning("process %d has lost job %s and does not end", lone.process.pid, lone.job)
                lone.process.kill()
                await lone.exit
                return COULD_NOT_RUN  # not its job's doing, even if it has claimed that meanwhile

    async def _condemned(self, lone: _Lone, how: str) -> bool:
        # After its lease the row is the reaper's; until then nobody else can have it.
        until = time.monotonic() + self._settings.lease.total_seconds()
        while True:
            try:
                return await self.condemn(lone.job, lone.worker, how)
            except UNREACHABLE as error:
                if time.monotonic() >= until:
                    _logger.warning("a lone process died (%s), and the store is away: %s", how, error)
                    return False
            await asyncio.sleep(_PAUSE)


def _environment(settings: Settings) -> dict[str, str]:
    """Return this process's environment, settings and import path, for a process with one slot."""
    given = {**os.environ, **settings.environment(), "HEADRACE_CONCURRENCY": "1"}
    given.pop("HEADRACE_METRICS_PORT", None)
    given["PYTHONPATH"] = os.pathsep.join(path or os.curdir for path in sys.path)
    return given


def _exit_of(process: "subprocess.Popen[bytes]") -> asyncio.Future[int]:
    """Wait in a thread: the event loop's own way would kill the process together with the loop."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[int] = loop.create_future()

    def wait() -> None:
        code = process.wait()
        with contextlib.suppress(RuntimeError):  # the loop may be closed by now
            loop.call_soon_threadsafe(_tell, ended, code)

    threading.Thread(target=wait, name=f"process-{process.pid}", daemon=True).start()
    return ended


def _tell(ended: asyncio.Future[int], code: int) -> None:
    if not ended.done():
        ended.set_result(code)


def _how(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    name = signal.strsignal(-code)
    return f"signal {-code} ({name.lower()})" if name else f"signal {-code}"
