"""One examination of everything a process would use."""

from dataclasses import replace
from urllib.parse import unquote, urlsplit

from headrace_shared.dispatch.connection import Redis
from headrace_shared.doctor.clocks import examine_clocks
from headrace_shared.doctor.findings import Finding
from headrace_shared.doctor.postgres import examine_postgres
from headrace_shared.doctor.redis import examine_redis
from headrace_shared.settings import Settings
from headrace_shared.store.pool import connect


async def examine(postgres_url: str, redis_url: str, settings: Settings) -> list[Finding]:
    """Look at both servers as this process would use them; nothing is changed.

    Raises:
        InvalidConfiguration: a URL is none of PostgreSQL, or of Redis.

    """
    redis = Redis(redis_url)
    try:
        store, store_answers = await examine_postgres(postgres_url, settings)
        dispatch, dispatch_answers = await examine_redis(redis)
        clocks: list[Finding] = []
        if store_answers:
            connection = await connect(postgres_url)
            try:
                clocks = await examine_clocks(connection, redis if dispatch_answers else None)
            finally:
                await connection.close(timeout=5)
    finally:
        await redis.close()
    secrets = _passwords(postgres_url, redis_url, settings.listen_url or "")
    return [_without(finding, secrets) for finding in [*store, *dispatch, *clocks]]


def _passwords(*urls: str) -> set[str]:
    """What stands between the colon and the at of a URL, as it is written and as it is meant."""
    raw = {urlsplit(url).netloc.rpartition("@")[0].partition(":")[2] for url in urls}
    return {text for one in raw for text in (one, unquote(one)) if text}


def _without(finding: Finding, secrets: set[str]) -> Finding:
    says = finding.says
    for secret in sorted(secrets, key=len, reverse=True):
        says = says.replace(secret, "***")
    return replace(finding, says=says)
