"""The command `headrace`."""

import json
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import cast

import asyncpg
import typer

from headrace_producer.commands import breakers, budgets, config, limits, webhooks
from headrace_producer.commands.dead_letters import failures, retry
from headrace_producer.commands.doctor import doctor
from headrace_producer.commands.jobs import cancel, result, status
from headrace_producer.commands.migrate import migrate
from headrace_producer.commands.pauses import pause, pauses, queues, resume
from headrace_producer.commands.settle import settle
from headrace_producer.commands.submit import submit
from headrace_producer.commands.up import up
from headrace_producer.commands.usage import usage
from headrace_producer.commands.why import why
from headrace_producer.console import plain
from headrace_producer.scripts import BAD_INPUT, exit_code
from headrace_shared.errors import (
    HeadraceError,
    InvalidBatchFile,
    MissingExtra,
    StoreError,
)
from headrace_shared.store.pool import UNREACHABLE
from headrace_shared.validation import in_plain_words

COMMANDS = "headrace.commands"
"""The entry-point group through which other parts add commands; each is a function or a Typer app."""

INTERRUPTED = 130

_EXTRAS = {"headrace_workers": "worker", "headrace_shared": "embedded"}


def main() -> None:
    """Run the command line; the process ends with what `run` returns."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command.

    Returns:
        0: all went well. 1: some of it failed. 2: bad input or configuration, in one sentence
        on standard error. 130: interrupted.

    """
    given = list(arguments) or ["--help"]
    try:
        code: object = build(given)(given, prog_name="headrace", standalone_mode=False)
    except typer.TyperException as error:
        problem = in_plain_words(" ".join(error.format_message().split())).rstrip(".")
        return _refuse(given, f"{problem} (see '{_command_of(error)} --help').")
    except HeadraceError as error:
        return _explain(given, error)
    except (*UNREACHABLE, asyncpg.PostgresError) as error:
        return _explain(given, _of_the_store(error))
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    return code if isinstance(code, int) else 0


def build(arguments: Sequence[str]) -> typer.Typer:
    """Put the commands together; those of other parts only when they are asked for, or for help."""
    app = typer.Typer(
        help="Feed AI jobs to model providers: within budgets, none lost, none paid twice.",
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        add_completion=False,
    )
    for command in (submit, status, result, cancel, failures, retry, up, migrate, usage, settle, doctor):
        app.command()(command)
    for hand in (pause, resume, pauses, why):
        app.command()(hand)
    app.add_typer(breakers.app, name="breakers")
    app.add_typer(queues, name="queues")
    app.add_typer(budgets.app, name="budgets")
    app.add_typer(config.app, name="config")
    app.add_typer(limits.app, name="limits")
    app.add_typer(webhooks.app, name="webhooks")
    asked = next((argument for argument in arguments if not argument.startswith("-")), None)
    for entry in sorted(entry_points(group=COMMANDS)):
        if asked in (None, entry.name):
            _add(app, entry)
    return app


def _add(app: typer.Typer, entry: EntryPoint) -> None:
    try:
        loaded: object = entry.load()
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(entry.module.partition(".")[0], entry.module)
        loaded = _missing(entry.name, extra, error)
    if isinstance(loaded, typer.Typer):
        app.add_typer(loaded, name=entry.name)
    elif callable(loaded):
        app.command(entry.name)(cast("Callable[..., object]", loaded))


def _missing(name: str, extra: str, error: ModuleNotFoundError) -> Callable[[], None]:
    def refuse() -> None:
        raise MissingExtra(feature=f"'headrace {name}'", extra=extra) from error

    refuse.__doc__ = f'Needs pip install "headrace[{extra}]".'
    return refuse


def _command_of(error: typer.TyperException) -> str:
    """Return the whole command that was given wrongly; `headrace` where it is none of its commands."""
    context: object = getattr(error, "ctx", None)
    path: object = getattr(context, "command_path", None)
    return path if isinstance(path, str) else "headrace"


def _explain(arguments: Sequence[str], error: HeadraceError) -> int:
    if isinstance(error, InvalidBatchFile):
        for line, reason in error.problems:
            typer.echo(plain(f"{error.path}:{line}: {reason}"), err=True)
    _refuse(arguments, error.message)
    return exit_code(error)


def _of_the_store(error: BaseException) -> HeadraceError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return StoreError(reason=f"PostgreSQL failed: {lines[0]}.")


def _refuse(arguments: Sequence[str], sentence: str) -> int:
    typer.echo(plain(f"headrace: {sentence}"), err=True)
    if "--json" in arguments:
        typer.echo(json.dumps({"error": sentence}))
    return BAD_INPUT
