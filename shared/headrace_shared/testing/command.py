"""The command `headrace simulate-provider`."""

import json
import os
from datetime import timedelta
from typing import Annotated

import typer

from headrace_shared.errors import InvalidConfiguration
from headrace_shared.testing.behaviour import Behaviour
from headrace_shared.testing.limits import Enforcement


def simulate_provider(
    *,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free port.")] = 0,
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    latency: Annotated[float, typer.Option(min=0.0, metavar="SECONDS", help="Mean time to an answer.")] = 0.0,
    jitter: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Spread of the latency, as a fraction of it.")
    ] = 0.0,
    fail: Annotated[float, typer.Option(min=0.0, max=1.0, help="Fraction answered 429 or 500.")] = 0.0,
    hang: Annotated[float, typer.Option(min=0.0, max=1.0, help="Fraction that is never answered.")] = 0.0,
    cut: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Fraction closed in the middle of the body.")
    ] = 0.0,
    garbage: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Fraction answered 200, unreadably.")
    ] = 0.0,
    retry_after: Annotated[
        float | None, typer.Option(min=0.0, metavar="SECONDS", help="Sent with a 429.")
    ] = None,
    output_tokens: Annotated[int, typer.Option(min=1, help="Mean length of an answer.")] = 40,
    rpm: Annotated[
        int | None, typer.Option(min=1, help="Requests per minute allowed for each model.")
    ] = None,
    tpm: Annotated[int | None, typer.Option(min=1, help="Tokens per minute allowed for each model.")] = None,
    enforcement: Annotated[Enforcement, typer.Option(help="How these are kept.")] = Enforcement.BUCKET,
    seed: Annotated[int, typer.Option(help="The same seed gives the same failures.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes that share the port.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the address as a JSON line.")] = False,
) -> None:
    """Run a provider that speaks the OpenAI wire, calls no model, and fails as it is told."""
    try:
        behaviour = Behaviour(
            latency=timedelta(seconds=latency),
            jitter=jitter,
            fail=fail,
            hang=hang,
            cut=cut,
            garbage=garbage,
            retry_after=None if retry_after is None else timedelta(seconds=retry_after),
            output_tokens=output_tokens,
            requests_per_minute=rpm,
            tokens_per_minute=tpm,
            enforcement=enforcement,
            seed=seed,
        )
    except InvalidConfiguration as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error

    _serve(behaviour, host=host, port=port, workers=workers, as_json=as_json)


def _serve(behaviour: Behaviour, *, host: str, port: int, workers: int, as_json: bool) -> None:
    try:
        # Here, so that every other command starts without aiohttp, which is an extra.
        from headrace_shared.testing.simulated_fleet import serve  # noqa: PLC0415
    except ModuleNotFoundError as error:
        typer.echo(f"The simulated provider needs {error.name}: pip install 'headrace[embedded]'.", err=True)
        raise typer.Exit(2) from error

    def announce(url: str) -> None:
        typer.echo(json.dumps({"url": url}) if as_json else f"Simulated provider listening at {url}")

    try:
        serve(behaviour, host=host, port=port, workers=workers, announce=announce)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        typer.echo(f"The simulated provider cannot listen at {host}:{port} ({reason}).", err=True)
        raise typer.Exit(2) from error
