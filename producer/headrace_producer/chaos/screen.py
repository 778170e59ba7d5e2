"""What a run says while it goes on: plain lines, each with the time since the beginning."""

import time

import typer

from headrace_producer.console import plain


class Screen:
    """Prints to standard output, or to standard error where that ends with a JSON object."""

    def __init__(self, *, stderr: bool = False) -> None:
        self._stderr = stderr
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def event(self, text: str) -> None:
        minutes, seconds = divmod(int(self.seconds), 60)
        self.show(f"{minutes}:{seconds:02} {text}")

    def show(self, text: str) -> None:
        typer.echo(plain(text), err=self._stderr)
