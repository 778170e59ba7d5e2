"""Options that several commands have."""

from typing import Annotated, TypeAlias

import typer

AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="End the output with one JSON object.")]
TenantName: TypeAlias = Annotated[str, typer.Option("--tenant", help="Whose jobs these are.")]
