"""`headrace doctor`: whether both servers are as they must be."""

import asyncio

import typer

from headrace_producer.commands.options import AsJson
from headrace_producer.console import Console, count
from headrace_shared.doctor import Finding, Level, examine
from headrace_shared.servers import configured_servers
from headrace_shared.settings import load_settings


def doctor(*, as_json: AsJson = False) -> None:
    """Examine PostgreSQL and Redis, and say what would be right; exit 1 if there is a problem."""
    console = Console(as_json)
    findings = asyncio.run(_examine())
    _report(console, findings)
    if _number(findings, Level.PROBLEM):
        raise typer.Exit(1)


async def _examine() -> list[Finding]:
    settings = load_settings()
    async with configured_servers(settings) as servers:
        return await examine(servers.postgres_url, servers.redis_url, settings)


def _report(console: Console, findings: list[Finding]) -> None:
    for level in (Level.PROBLEM, Level.WARNING, Level.OK):
        for finding in findings:
            if finding.level is level:
                console.say(f"{finding.level:<9}{finding.check}: {finding.says}")
    problems, warnings = _number(findings, Level.PROBLEM), _number(findings, Level.WARNING)
    console.say(f"{count(problems, 'problem')}, {count(warnings, 'warning')}.")
    console.conclude(
        {
            "problems": problems,
            "warnings": warnings,
            "checks": [{"check": one.check, "level": one.level, "says": one.says} for one in findings],
        }
    )


def _number(findings: list[Finding], level: Level) -> int:
    return sum(finding.level is level for finding in findings)
