"""What the documents name exists: tests, faults of the chaos run, files of the project, pages."""

import ast
import re
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest

from headrace_producer.chaos.faults import FAULTS
from headrace_shared.configuration import Configuration

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"
PARTS = ("benchmarks", "producer", "shared", "tests", "workers")
RELIABILITY = ROOT / "docs" / "reliability.md"
ON_THE_MAP = (
    ROOT / "ARCHITECTURE.md",
    ROOT / "CONTRIBUTING.md",
    RELIABILITY,
    *(ROOT / part / "README.md" for part in ("producer", "shared", "workers")),
)
PAGES = (
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted(ROOT.glob("*/README.md")),
)

_QUOTED = re.compile(r"`([^`\n]+)`")
_TEST = re.compile(r"(test_\w+\.py)?(?:::(test_\w+))?")
_FAULT = re.compile(r"[a-z0-9*]+(?:-[a-z0-9*]+)*")
_PLACE = re.compile(r"[\w./-]+(?:\.py|\.sql|\.lua|\.md|\.yml|/)")
_MEMBER = re.compile(r"(\w+)\.((?!(?:py|sql|lua|md)$)\w+)")
_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def test_every_test_that_the_page_of_promises_names_exists() -> None:
    named = named_tests(RELIABILITY.read_text(encoding="utf-8"))
    assert named
    assert [f"{file}::{test}" for file, test in named if not is_a_test(file, test)] == []


def test_every_fault_that_the_page_of_promises_names_can_be_done() -> None:
    patterns = named_faults(RELIABILITY.read_text(encoding="utf-8"))
    assert patterns
    unknown = {one for one in patterns if not any(fnmatchcase(fault, one) for fault in FAULTS)}
    assert unknown == set()


@pytest.mark.parametrize("page", ON_THE_MAP, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_a_map_names_exists(page: Path) -> None:
    named = {word for word in _QUOTED.findall(page.read_text(encoding="utf-8")) if _PLACE.fullmatch(word)}
    assert named
    assert {word for word in named if not is_a_place(word)} == set()


def test_what_the_map_names_in_a_module_is_defined_there() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    named = {match.groups() for word in _QUOTED.findall(text) if (match := _MEMBER.fullmatch(word))}
    modules = {(module, name) for module, name in named if modules_called(module)}
    assert modules
    assert {one for one in modules if not is_defined(*one)} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_within_the_project_leads_somewhere(page: Path) -> None:
    links = {link for link in _LINK.findall(page.read_text(encoding="utf-8")) if ":" not in link}
    assert {link for link in links if not (page.parent / link).exists()} == set()


def test_every_decision_is_in_the_index_under_its_title() -> None:
    index = (ROOT / "docs" / "adr" / "README.md").read_text(encoding="utf-8")
    for page in sorted((ROOT / "docs" / "adr").glob("0*.md")):
        number, _, title = page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ").partition(". ")
        assert f"\n{number}. [{title}]({page.name})" in index


def named_tests(text: str) -> list[tuple[str, str | None]]:
    """Return (file, test or None); one without a file is of the file that its line named before."""
    found: list[tuple[str, str | None]] = []
    for line in text.splitlines():
        file = ""
        for word in _QUOTED.findall(line):
            if "test_" in word and (match := _TEST.fullmatch(word)):
                file = match[1] or file
                found.append((file, match[2]))
    return found


def named_faults(text: str) -> set[str]:
    """Return the patterns that stand in the last column of the table of faults."""
    rows = [line for line in text.partition("\n## Faults\n")[2].splitlines() if line.startswith("|")]
    words = {word for row in rows for word in _QUOTED.findall(row.rstrip(" |").rpartition("|")[2])}
    return {word for word in words if _FAULT.fullmatch(word)}


@cache
def _functions_of(file: str) -> frozenset[str]:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return frozenset(
        node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )


def is_a_test(file: str, test: str | None) -> bool:
    return (TESTS / file).is_file() and (test is None or test in _functions_of(file))


def is_a_place(word: str) -> bool:
    """Say whether a path below the root ends with these parts, or, at the root, is them."""
    if (ROOT / word).exists():
        return True
    return any(next((ROOT / part).rglob(word.rstrip("/")), None) is not None for part in PARTS)


def modules_called(name: str) -> list[Path]:
    """Return the modules of that name; a table of headrace.toml is meant by its own name, and is none."""
    if name in Configuration.model_fields:
        return []
    return [path for part in PARTS for path in (ROOT / part).rglob(f"{name}.py")]


def is_defined(module: str, name: str) -> bool:
    bodies = [ast.parse(path.read_text(encoding="utf-8")).body for path in modules_called(module)]
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return any(isinstance(node, definitions) and node.name == name for body in bodies for node in body)
