"""Some of the answers, as a client reads them."""

from collections.abc import Iterable
from datetime import timedelta

from pydantic import BaseModel, ValidationError
from rich.text import Text

from headrace_producer import JobHandle, JobResult
from headrace_producer.demo.screen import Screen
from headrace_producer.demo.tasks import Task
from headrace_shared.errors import JobFailed, ResultTimeout
from headrace_shared.money import format_usd

_LONGEST = 70
_PATIENCE = timedelta(seconds=5)


class _Message(BaseModel):
    content: str


class _Choice(BaseModel):
    message: _Message


class _Chat(BaseModel):
    choices: tuple[_Choice, ...]


async def show_answers(asked: Iterable[tuple[Task, JobHandle]], screen: Screen) -> None:
    """Print what some jobs were answered."""
    for task, handle in asked:
        try:
            result = await handle.result(timeout=_PATIENCE)
        except (JobFailed, ResultTimeout) as error:
            screen.event(str(error), "red")
        else:
            screen.show(_line(task, result))


def _line(task: Task, result: JobResult) -> Text:
    usage = result.usage
    line = Text(f"          {_short(task.prompt)} ", style="dim")
    line.append(_short(_text(result.raw)), style="cyan")
    line.append(
        f"  ({usage.prompt_tokens} + {usage.completion_tokens} tokens, {format_usd(usage.cost_nano_usd)}, "
        f"{result.attempts} attempt(s))",
        style="dim",
    )
    return line


def _text(raw: bytes) -> str:
    try:
        return _Chat.model_validate_json(raw).choices[0].message.content
    except (ValidationError, IndexError):
        return raw.decode(errors="replace")


def _short(text: str) -> str:
    """Return a text on one line, and without anything that a terminal would obey."""
    line = "".join(letter if letter.isprintable() else " " for letter in text).strip()
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
