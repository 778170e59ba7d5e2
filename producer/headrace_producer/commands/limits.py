"""`headrace limits`: what providers let through, who says so, and how much of it is used."""

import asyncio
from typing import Annotated

import typer

from headrace_producer.commands.options import AsJson
from headrace_producer.connections import open_connections, redis_may_be_away
from headrace_producer.console import Console
from headrace_shared.configuration import Configuration
from headrace_shared.configuration_sections import LimitSection
from headrace_shared.dispatch import limits
from headrace_shared.dispatch.limits import Measure, View
from headrace_shared.durations import format_duration
from headrace_shared.errors import InvalidInput, InvalidRequest, UnknownPrice
from headrace_shared.prices import PriceBook
from headrace_shared.routes import Target
from headrace_shared.settings import load_settings
from headrace_shared.store import configurations

app = typer.Typer(help="Limits of providers, kept by the whole fleet.", rich_markup_mode=None)

_NONE = typer.Option(min=0, metavar="N", help="At most; 0 takes the limit away.")
_MOST = Annotated[int | None, _NONE]


@app.command("set")
def set_limit(
    name: Annotated[str, typer.Argument(metavar="LIMITER", help="PROVIDER, or PROVIDER/MODEL.")],
    *,
    requests: _MOST = None,
    tokens: _MOST = None,
    concurrent: _MOST = None,
    as_json: AsJson = False,
) -> None:
    """Set limits of a provider or model, requests and tokens a minute; a new version of the configuration."""
    given = {"requests_per_minute": requests, "tokens_per_minute": tokens, "concurrent": concurrent}
    changes = {key: value for key, value in given.items() if value is not None}
    if not changes:
        raise InvalidInput(reason="Nothing is set: give --requests, --tokens or --concurrent.")
    asyncio.run(_set(Console(as_json), name, changes))


@app.command()
def show(*, as_json: AsJson = False) -> None:
    """Show every limit that is configured or was learnt, and what is used of it."""
    asyncio.run(_show(Console(as_json)))


async def _set(console: Console, name: str, changes: dict[str, int]) -> None:
    async with open_connections(load_settings()) as connections:
        present = await configurations.current(connections.pool)
        _check_called(present.configuration, name)
        changed = _changed(present.configuration, name, changes)
        source = f"limits set {name}"
        applied = await configurations.apply(connections.pool, changed, source, over=present.version)
        # At once, for claims as well; a worker that follows the version would do the same.
        with redis_may_be_away(console):
            await limits.publish(connections.redis, applied.version, changed)
    section = changed.limits.get(name, LimitSection())
    console.say(f"{name}: {_sentence(section)} (version {applied.version} of the configuration).")
    console.conclude({"limiter": name, "version": applied.version, **section.model_dump()})


def _check_called(present: Configuration, name: str) -> None:
    """Refuse a model that nobody can call; one that has a limit already may have it changed.

    Raises:
        InvalidRequest: names those that can be called.

    """
    provider, _, model = name.partition("/")
    if not model or name in present.limits or provider not in present.providers:
        return
    named = {str(each.target) for route in present.routes.values() for each in route.called}
    known = sorted(named.union(present.prices))
    if present.defaults.any_model:
        if provider == present.defaults.provider and _has_price(present, Target(provider, model)):
            return
        known.append(f"any model of {present.defaults.provider} that has a price")
    if name not in known:
        raise InvalidRequest(
            field="LIMITER",
            reason=f"nothing calls {name!r}, which no route and no price names (known: "
            f"{', '.join(known) or 'none'})",
        )


def _has_price(present: Configuration, target: Target) -> bool:
    try:
        PriceBook(present).price(target)
    except UnknownPrice:
        return False
    return True


def _changed(present: Configuration, name: str, changes: dict[str, int]) -> Configuration:
    known = present.limits.get(name, LimitSection()).model_dump()
    section = {key: value for key, value in {**known, **changes}.items() if value}
    others = {other: one.model_dump(exclude_none=True) for other, one in present.limits.items()}
    document = {**present.document(), "limits": {**others, name: section}}
    return Configuration.from_document(document)


def _sentence(section: LimitSection) -> str:
    parts = [
        f"{count:,} {what}"
        for count, what in (
            (section.requests_per_minute, "requests a minute"),
            (section.tokens_per_minute, "tokens a minute"),
            (section.concurrent, "calls at a time"),
        )
        if count is not None
    ]
    return f"at most {', '.join(parts)}" if parts else "no configured limit"


async def _show(console: Console) -> None:
    async with open_connections(load_settings()) as connections:
        present = await configurations.current(connections.pool)
        await limits.publish(connections.redis, present.version, present.configuration)
        names = {*present.configuration.ceilings(), *await limits.known(connections.redis)}
        found = await limits.view(connections.redis, sorted(names))
    views = [view for view in found if view.measures]
    if not views:
        console.say("No limit is configured, and no provider has said one.")
    else:
        console.table(
            ("limiter", "what", "limit", "source", "in force", "used", "waits"),
            [row for view in views for row in _rows(view)],
        )
    console.conclude({"limits": [_as_json(view) for view in views]})


def _rows(view: View) -> list[tuple[str, ...]]:
    waits = format_duration(view.standing.wait) if view.standing.wait else ""
    return [
        (
            limits.display_name(view.standing.limiter),
            one.what,
            _number(one.limit),
            one.source,
            _number(one.in_force),
            _number(one.used),
            waits,
        )
        for one in view.measures
    ]


def _number(count: int | None) -> str:
    return "" if count is None else f"{count:,}"


def _as_json(view: View) -> dict[str, object]:
    return {
        "limiter": limits.display_name(view.standing.limiter),
        "wait_seconds": view.standing.wait.total_seconds(),
        "cooling_seconds": view.standing.cooling.total_seconds(),
        **{one.what: _of(one) for one in view.measures},
    }


def _of(measure: Measure) -> dict[str, object]:
    return {
        "limit": measure.limit,
        "source": measure.source,
        "in_force": measure.in_force,
        "used": measure.used,
    }
