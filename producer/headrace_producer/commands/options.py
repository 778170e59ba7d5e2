"""Options that several commands have."""

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="End the output with one JSON object.")]
TenantName: TypeAlias = Annotated[str, typer.Option("--tenant", help="Whose jobs these are.")]
OutputFile: TypeAlias = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where answers are written.")
]
ErrorsFile: TypeAlias = Annotated[
    Path | None, typer.Option("--errors", metavar="FILE", help="Where a batch's failures are written.")
]
