"""The machine and the versions that the figures are of."""

import os
import platform
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

_PACKAGES = ("openai", "aiohttp", "asyncpg", "redis", "arq", "uvloop")


def describe() -> dict[str, str]:
    return {
        "processor": f"{os.cpu_count()} x {_model()}",
        "load": f"{os.getloadavg()[0]:.1f} before",
        "system": platform.platform(),
        "python": platform.python_version(),
        **{package: version(package) for package in _PACKAGES},
    }


def _model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
