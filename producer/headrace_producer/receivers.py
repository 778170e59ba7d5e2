"""Receivers of callbacks for the commands that play a tenant's part, too."""

from collections.abc import Mapping

from headrace_shared import webhooks
from headrace_shared.ids import Tenant
from headrace_shared.testing.webhook_receiver import WebhookReceiver


def verifying_receiver(tenant: str, master: str) -> WebhookReceiver:
    """Return a tenant's receiver, not yet open; it verifies with the tenant's secret."""
    secret = webhooks.tenant_secret(master.encode(), Tenant(tenant))

    def verify(body: bytes, headers: Mapping[str, str]) -> None:
        webhooks.verify(body, headers, secret)

    return WebhookReceiver(verify=verify, path=f"/{tenant}")
