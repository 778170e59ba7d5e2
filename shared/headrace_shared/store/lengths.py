"""How long answers were, by template and model, as the store has it."""

from collections.abc import Collection, Mapping
from datetime import timedelta

from headrace_shared.sketches import Sketch, SketchKey
from headrace_shared.store.pool import Database
from headrace_shared.store.sql import Statements

_SQL = Statements("lengths.sql")


async def learn(database: Database, seen: Mapping[SketchKey, Sketch]) -> None:
    """Add to what is known of templates and models."""
    sketches = list(seen.values())
    await database.execute(
        _SQL["learn"],
        *_columns(seen),
        [one.calls for one in sketches],
        [one.prompt_tokens for one in sketches],
        [one.cached_tokens for one in sketches],
        [one.body_bytes for one in sketches],
        [",".join(map(str, one.lengths)) for one in sketches],
    )


async def learnt(database: Database, keys: Collection[SketchKey]) -> dict[SketchKey, Sketch]:
    """Return what is known of these; what was never seen is missing."""
    rows = await database.fetch(_SQL["learnt"], *_columns(keys))
    return {
        SketchKey(row["provider"], row["model"], row["template"]): Sketch(
            row["calls"],
            row["prompt_tokens"],
            row["cached_tokens"],
            row["body_bytes"],
            tuple(row["lengths"]),
        )
        for row in rows
    }


async def forget_lengths(database: Database, *, unseen_for: timedelta) -> None:
    """Forget templates and models that were not asked for so long."""
    await database.execute(_SQL["forget_lengths"], unseen_for.total_seconds())


def _columns(keys: Collection[SketchKey]) -> tuple[list[str], list[str], list[str]]:
    return [key.provider for key in keys], [key.model for key in keys], [key.template for key in keys]
