"""Secrets are named, never written down: what is kept is a reference to one."""

import os
from dataclasses import dataclass
from pathlib import Path

from headrace_shared.errors import MissingSetting

NOTHING = "none"
"""The reference of a provider that asks for no key."""


class Secret:
    """A secret's value, masked wherever it is printed.

    >>> f"{Secret('hunter2')}", Secret("hunter2").reveal()
    ("Secret('…')", 'hunter2')
    """

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "Secret('…')"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other.reveal() == self._value

    def __hash__(self) -> int:
        return hash(self._value)


@dataclass(frozen=True, slots=True)
class SecretReference:
    """Where a secret is read from: ``env:NAME``, ``file:PATH``, or ``none`` where there is none.

    Raises:
        ValueError: the text is anything else; it is not repeated, for it may be the secret itself.

    """

    text: str

    def __post_init__(self) -> None:
        kind, _, name = self.text.partition(":")
        if self.text != NOTHING and (kind not in {"env", "file"} or not name.strip()):
            raise ValueError(
                "must not be the secret itself: write env:NAME or file:PATH, where it is read from"
            )

    def __str__(self) -> str:
        return self.text

    def resolve(self) -> Secret:
        """Read the secret, without the line end a file may have.

        Raises:
            MissingSetting: the variable is unset or empty, or the file is unreadable or empty.

        """
        kind, _, name = self.text.partition(":")
        if kind == "env":
            return self._from_environment(name)
        if kind == "file":
            return self._from_file(name)
        return Secret("")

    @staticmethod
    def _from_environment(name: str) -> Secret:
        value = os.environ.get(name, "")
        if not value:
            raise MissingSetting(where=name, reason="put the secret into this environment variable")
        return Secret(value)

    @staticmethod
    def _from_file(name: str) -> Secret:
        try:
            value = Path(name).read_text(encoding="utf-8").rstrip("\r\n")
        except OSError as error:
            reason = f"the file cannot be read ({error.strerror or type(error).__name__})"
            raise MissingSetting(where=f"file:{name}", reason=reason) from None
        except UnicodeDecodeError:
            raise MissingSetting(where=f"file:{name}", reason="the file is not UTF-8 text") from None
        if not value:
            raise MissingSetting(where=f"file:{name}", reason="the file is empty")
        return Secret(value)
