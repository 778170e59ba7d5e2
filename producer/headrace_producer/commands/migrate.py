"""`headrace migrate`: the schema of this code, in the database."""

import asyncio
from typing import Annotated

import typer

from headrace_producer.commands.options import AsJson
from headrace_producer.console import Console, count
from headrace_shared.servers import configured_servers
from headrace_shared.settings import load_settings
from headrace_shared.store import migrate as migrations
from headrace_shared.store.pool import connect


def migrate(
    *,
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit 2 if something is missing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Bring the database's schema up to date; harmless to repeat, and from several places at once."""
    asyncio.run(_migrate(Console(as_json), check_only=check))


async def _migrate(console: Console, *, check_only: bool) -> None:
    settings = load_settings()
    async with configured_servers(settings) as servers:
        connection = await connect(servers.postgres_url)
        try:
            applied = [] if check_only else await migrations.migrate(connection)
            await migrations.check(connection)
            version = await migrations.schema_version(connection)
        finally:
            await connection.close()
    said = f"{count(len(applied), 'migration')} applied: {', '.join(applied)}" if applied else "up to date"
    console.say(f"The schema has version {version}, {said}.")
    console.conclude({"version": version, "applied": applied})
