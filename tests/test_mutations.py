"""Each mechanism of recovery is switched off once in a copy of the code, and its test must fail."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Servers
from mutations import EACH_TIME, MORE, Mutation

ROOT = Path(__file__).parent.parent
PARTS = ("shared", "producer", "workers")
A_TEST_FAILED = 1
"""pytest's exit code; an error of the harness is another."""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for part in PARTS:
        shutil.copytree(ROOT / part, tmp_path / part)
    return tmp_path


MUTATIONS = (
    *(pytest.param(each, id=each.mechanism) for each in EACH_TIME),
    *(pytest.param(each, id=each.mechanism, marks=pytest.mark.mutations) for each in MORE),
)


def test_each_mechanism_is_where_it_is_switched_off() -> None:
    for mutation in (*EACH_TIME, *MORE):
        text = (ROOT / mutation.file).read_text(encoding="utf-8")
        assert text.count(mutation.old) == 1, f"{mutation.file} has not exactly one place {mutation.old!r}"


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mechanism_that_is_missing_is_missed(mutation: Mutation, copy: Path, servers: Servers) -> None:
    file = copy / mutation.file
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    ran = run(mutation.caught_by, copy, servers)
    assert ran.returncode == A_TEST_FAILED, ran.stdout[-4000:] + ran.stderr[-1000:]


def run(test: str, copy: Path, servers: Servers) -> subprocess.CompletedProcess[str]:
    """Run one test on the copy; its schema is the copy's, and this process waits meanwhile."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {
        "PYTHONPATH": os.pathsep.join(str(copy / part) for part in PARTS),
        "HEADRACE_TEST_POSTGRES_URL": servers.postgres_url,
        "HEADRACE_TEST_REDIS_URL": servers.redis_url,
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        # Not below the folder of all runs: a run that begins takes it away from other users, and with it
        # what servers of tests under way need that do not run as root.
        f"--basetemp={copy / 'tests'}",
        "-x",
        f"tests/{test}",
    ]
    return subprocess.run(  # noqa: S603 - our own tests
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
