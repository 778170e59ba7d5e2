import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import pytest
from pydantic import BaseModel

from headrace_producer.demo.disturbances import Crash, Outage
from headrace_producer.demo.ledger import Holding, Latency, Progress, Totals
from headrace_producer.demo.tasks import LANES, MODELS, TENANTS, tasks
from headrace_producer.demo.verdict import Callbacks, Facts, claims_of
from headrace_shared.money import NanoUSD

SECOND = timedelta(seconds=1)
JOBS = frozenset({UUID(int=1), UUID(int=2)})

GOOD = Facts(
    enqueued=JOBS,
    now=Progress(2, 2, 0, 0, 1, 20, 10, NanoUSD(100), NanoUSD(30)),
    totals=Totals(3, 1, 4, 1, 0, SECOND, Latency(SECOND, SECOND), Latency(SECOND, SECOND)),
    limit=NanoUSD(1000),
    over_budget=0,
    held=NanoUSD(0),
    callbacks=Callbacks(JOBS, 0, 0),
    books=NanoUSD(110),
    outage=Outage(1, 1),
    crash=Crash(4711, Holding([UUID(int=2)], [1], 1, NanoUSD(30)), 1, SECOND),
    crash_planned=True,
)


class Claim(BaseModel):
    claim: str
    holds: bool
    detail: str


class Answer(BaseModel):
    ok: bool
    succeeded: int
    webhooks_verified: int
    breakers_opened: int
    killed_held: int
    claims: list[Claim]


@asynccontextmanager
async def demo(*arguments: str, temporary: Path) -> AsyncGenerator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "headrace_producer",
        "demo",
        *arguments,
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await process.communicate()


def names_in(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()]


async def test_every_claim_holds_through_an_outage_and_a_crash(tmp_path: Path) -> None:
    async with demo("--jobs", "60", "--json", temporary=tmp_path) as process:
        output, said = await process.communicate()

    assert process.returncode == 0, said.decode()
    answer = Answer.model_validate_json(output.splitlines()[-1])
    assert answer.ok
    assert [claim for claim in answer.claims if not claim.holds] == []
    assert len(answer.claims) == 7
    assert (answer.succeeded, answer.webhooks_verified) == (60, 60)
    assert answer.breakers_opened >= 1
    assert answer.killed_held >= 1
    assert names_in(tmp_path) == []


async def test_ctrl_c_ends_everything_that_was_started(tmp_path: Path) -> None:
    async with demo("--jobs", "500", "--json", temporary=tmp_path) as process:
        assert process.stderr is not None
        pids: list[int] = []
        async for line in process.stderr:
            if found := re.search(rb"pid (\d+) and (\d+)", line):
                pids = [int(pid) for pid in found.groups()]
                break
        process.send_signal(signal.SIGINT)
        output, _ = await process.communicate()

    assert process.returncode == 130
    assert output == b""
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert names_in(tmp_path) == []


async def test_a_real_provider_is_not_paid_without_consent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-somebody")
    async with demo("--jobs", "60", temporary=tmp_path) as process:
        _, said = await process.communicate()

    assert process.returncode == 2
    assert b"--yes" in said.splitlines()[-1]


async def test_a_real_provider_needs_a_key(tmp_path: Path) -> None:
    async with demo("--provider", "openai", "--json", temporary=tmp_path) as process:
        output, said = await process.communicate()

    assert process.returncode == 2
    assert said.startswith(b"headrace: OPENAI_API_KEY is not set")
    assert "error" in json.loads(output.splitlines()[-1])


def test_a_good_run_has_no_false_claim() -> None:
    assert [claim for claim in claims_of(GOOD) if not claim.holds] == []


@pytest.mark.parametrize(
    ("untrue", "said"),
    [
        (replace(GOOD, now=replace(GOOD.now, succeeded=1, failed=1)), "every job succeeded"),
        (replace(GOOD, now=replace(GOOD.now, succeeded=1)), "every job succeeded"),
        (replace(GOOD, callbacks=Callbacks(frozenset({UUID(int=1)}), 1, 0)), "webhook"),
        (replace(GOOD, callbacks=Callbacks(JOBS, 0, 1)), "webhook"),
        (replace(GOOD, over_budget=1), "budget"),
        (replace(GOOD, held=NanoUSD(1)), "budget"),
        (replace(GOOD, books=NanoUSD(99)), "the ledger is the bill"),
        (replace(GOOD, books=NanoUSD(131)), "the ledger is the bill"),
        (replace(GOOD, outage=Outage(0, 0)), "breakers"),
        (replace(GOOD, outage=Outage(2, 1)), "breakers"),
        (replace(GOOD, totals=replace(GOOD.totals, crashes=0)), "came back"),
        (replace(GOOD, totals=replace(GOOD.totals, in_suspense=2)), "suspense is exactly"),
    ],
)
def test_what_is_not_true_is_said(untrue: Facts, said: str) -> None:
    false = [claim.text for claim in claims_of(untrue) if not claim.holds]
    assert len(false) == 1
    assert said in false[0]


def test_a_crash_that_did_not_happen_is_not_claimed() -> None:
    false = [claim.text for claim in claims_of(replace(GOOD, crash=None)) if not claim.holds]
    assert len(false) == 2


def test_tasks_differ_and_are_spread() -> None:
    work = tasks(1000)
    assert len({task.prompt for task in work}) == 1000
    assert {task.tenant for task in work} == set(TENANTS)
    assert {task.lane for task in work} == set(LANES)
    assert {task.body["model"] for task in work} == set(MODELS)
