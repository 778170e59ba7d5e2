"""Everything that runs jobs.

`headrace worker` starts a worker; so does ``arq headrace_workers.WorkerSettings``.
"""

from collections.abc import Mapping

__all__ = ["WorkerSettings"]

WorkerSettings: Mapping[str, object]
"""What arq's command line takes; read from the environment when it is asked for."""


def __getattr__(name: str) -> Mapping[str, object]:
    if name == "WorkerSettings":
        from headrace_workers.arq_settings import worker_settings  # noqa: PLC0415 - only arq's command needs it

        return worker_settings()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
