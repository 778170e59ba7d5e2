"""`headrace webhooks`: what a receiver needs, and what came of callbacks."""

import asyncio
from pathlib import Path
from typing import Annotated
from uuid import UUID

import typer

from headrace_producer.checking import check_tenant
from headrace_producer.commands.options import AsJson, TenantName
from headrace_producer.connections import open_connections
from headrace_producer.console import Console
from headrace_shared.errors import InvalidInput, JobNotFound, MissingSetting
from headrace_shared.ids import JobId, Tenant
from headrace_shared.policy import WebhookPolicy
from headrace_shared.servers import nearest_webhook_secret
from headrace_shared.settings import load_settings
from headrace_shared.store import configurations
from headrace_shared.store.alerts import SIGNED_AS
from headrace_shared.store.deliveries import Delivery, deliveries_of_job
from headrace_shared.store.jobs import get_job
from headrace_shared.webhooks import tenant_secret

app = typer.Typer(help="Callbacks: their secret, and what came of them.", rich_markup_mode=None)


@app.command()
def secret(
    *,
    tenant: TenantName = "default",
    alerts: Annotated[bool, typer.Option("--alerts", help="That of the receiver of alerts.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the secret with which a tenant's receiver, or that of alerts, verifies callbacks."""
    asyncio.run(_secret(Console(as_json), SIGNED_AS if alerts else check_tenant(tenant)))


@app.command()
def deliveries(
    job: Annotated[str, typer.Argument(metavar="JOB", help="The job's id.")], *, as_json: AsJson = False
) -> None:
    """Show the callbacks of a job and every attempt at them."""
    asyncio.run(_deliveries(Console(as_json), job))


async def _secret(console: Console, name: Tenant) -> None:
    async with open_connections(load_settings()) as connections:
        configuration = (await configurations.current(connections.pool)).configuration
    derived = tenant_secret(_master(configuration.webhook_policy()).encode(), name)
    console.say(derived)
    console.conclude({"tenant": name, "secret": derived})


def _master(policy: WebhookPolicy) -> str:
    try:
        return policy.secret.resolve().reveal()
    except MissingSetting:
        # `headrace up` makes one of its own beside its servers.
        if (own := nearest_webhook_secret(Path.cwd())) is not None:
            return own
        raise


async def _deliveries(console: Console, job: str) -> None:
    try:
        job_id = JobId(UUID(job))
    except ValueError:
        raise InvalidInput(reason=f"{job!r} is not the id of a job.") from None
    async with open_connections(load_settings()) as connections:
        if await get_job(connections.pool, job_id) is None:
            raise JobNotFound(job_id=job_id)
        found = await deliveries_of_job(connections.pool, job_id)
    for delivery in found:
        _show(console, delivery)
    if not found:
        console.say("No callback: the job has not ended, or has no webhook.")
    console.conclude({"deliveries": [_as_json(delivery) for delivery in found]})


def _show(console: Console, delivery: Delivery) -> None:
    console.say(f"{delivery.webhook_id}  {delivery.event_type}  {delivery.state}  {delivery.url}")
    for attempt in delivery.attempts:
        came_to = attempt.error_class or "delivered"
        status = "" if attempt.status is None else f" {attempt.status}"
        seconds = attempt.duration.total_seconds()
        console.say(f"  {attempt.number}  {attempt.at:%Y-%m-%d %H:%M:%S}  {seconds:.3f} s  {came_to}{status}")
    if delivery.state == "pending":
        console.say(f"  next attempt at {delivery.next_attempt_at:%Y-%m-%d %H:%M:%S}")


def _as_json(delivery: Delivery) -> dict[str, object]:
    return {
        "webhook_id": delivery.webhook_id,
        "url": delivery.url,
        "event_type": delivery.event_type,
        "state": delivery.state,
        "attempts": [
            {
                "number": attempt.number,
                "at": attempt.at.isoformat(),
                "seconds": attempt.duration.total_seconds(),
                "status": attempt.status,
                "error_class": attempt.error_class,
            }
            for attempt in delivery.attempts
        ],
    }
