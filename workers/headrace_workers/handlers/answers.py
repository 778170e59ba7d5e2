"""What a handler's call is answered."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import BaseModel, ValidationError

from headrace_shared.jsonvalue import is_table


@dataclass(frozen=True, slots=True)
class Answer:
    """A model's answer."""

    raw: bytes = field(repr=False)
    """Byte for byte as the provider sent it."""
    model: str
    """The target's, which may be another name than the one that was asked for."""
    replayed: bool
    """It was paid for in an earlier run."""

    @property
    def body(self) -> Mapping[str, object]:
        """The answer, parsed anew each time."""
        value: object = json.loads(self.raw)
        return value if is_table(value) else {}

    @property
    def text(self) -> str:
        """The text of the first choice, or of the response; empty where there is none."""
        try:
            body = _Body.model_validate(self.body)
        except ValidationError:
            return ""
        message = body.choices[0].message if body.choices else None
        if message is not None:
            return message.content or ""
        return "".join(part.text or "" for item in body.output for part in item.content or ())


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message | None = None


class _Part(BaseModel):
    text: str | None = None


class _Item(BaseModel):
    content: list[_Part] | None = None


class _Body(BaseModel):
    choices: list[_Choice] = []
    output: list[_Item] = []
