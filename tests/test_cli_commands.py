"""What the commands do: a batch from its submission to its files, jobs, usage, budgets, configurations."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeAlias

import pytest

from headrace_producer import cli
from headrace_shared.ids import WorkerId
from headrace_shared.store import feed
from headrace_shared.store.pool import Pool
from headrace_shared.testing.endings import COST, End, Endings

BODY = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello"}]}
LONG = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def answer(self) -> dict[str, object]:
        """The JSON object on the last line."""
        last: dict[str, object] = json.loads(self.out.splitlines()[-1])
        return last

    def rows(self, name: str) -> list[dict[str, object]]:
        """A list in that object."""
        rows: list[dict[str, object]] = json.loads(self.out.splitlines()[-1])[name]
        return rows


Run: TypeAlias = Callable[..., Coroutine[None, None, Done]]


@pytest.fixture
def headrace(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)

    async def run(*arguments: object) -> Done:
        code = await asyncio.to_thread(cli.run, [str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return run


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    path = tmp_path / "requests.jsonl"
    rows = [
        {"custom_id": f"row-{n}", "method": "POST", "url": "/v1/chat/completions", "body": BODY}
        for n in range(1, 5)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


async def test_a_batch_is_followed_to_its_end(
    environment: None, pool: Pool, headrace: Run, requests: Path
) -> None:
    submitted = await headrace("submit", requests, "--tenant", "acme", "--json")
    assert submitted.code == 0
    batch = str(submitted.answer["batch_id"])
    assert {name: submitted.answer[name] for name in ("total", "succeeded", "failed", "cost_nano_usd")} == {
        "total": 4,
        "succeeded": 0,
        "failed": 0,
        "cost_nano_usd": 0,
    }
    await feed.register_worker(pool, WorkerId("w"), host="h", slots=1, lanes=("batch",), alive=LONG)
    waiting = asyncio.create_task(headrace("submit", requests, "--tenant", "acme", "--wait", "--json"))
    await Endings(pool).end_batch(batch, lambda line: End.answered(b'{"n": %d}' % line))
    done = await waiting
    assert done.code == 0
    assert done.answer["succeeded"] == 4
    assert done.answer["cost_nano_usd"] == 4 * COST
    written = await headrace("submit", requests, "--tenant", "acme", "-o", "out", "--errors", "err")
    assert written.code == 0
    assert len(Path("out").read_bytes().splitlines()) == 4  # noqa: ASYNC240
    assert Path("err").read_bytes() == b""  # noqa: ASYNC240
    printed = await headrace("submit", requests, "--tenant", "acme")
    assert [json.loads(line)["response"]["body"] for line in printed.out.splitlines()] == [
        {"n": number} for number in range(1, 5)
    ]


async def test_failures_are_exit_1_and_named(
    environment: None, pool: Pool, headrace: Run, requests: Path
) -> None:
    batch = (await headrace("submit", requests, "--json")).answer["batch_id"]
    await Endings(pool).end_batch(
        str(batch), lambda line: End.lost("\x1b[31mred\x1b[0m") if line == 2 else End.answered(b"{}")
    )
    done = await headrace("result", batch, "-o", "out")
    assert done.code == 1
    assert "line 2 (row-2) timeout: red" in done.err
    assert (await headrace("submit", requests, "--wait", "--json")).code == 1
    assert (await headrace("status", batch, "--json")).answer["failed"] == 1


async def test_one_job_has_a_status_and_a_result(
    environment: None, pool: Pool, headrace: Run, requests: Path
) -> None:
    await headrace("submit", requests)
    first, second = await pool.fetch("SELECT id FROM headrace.jobs ORDER BY line LIMIT 2")
    queued = await headrace("result", first["id"])
    assert (queued.code, "it is queued" in queued.err) == (1, True)
    await Endings(pool).end([(first["id"], End.answered(b'{ "a": 1}')), (second["id"], End.lost())])
    assert (await headrace("status", first["id"], "--json")).answer["status"] == "succeeded"
    found = await headrace("result", first["id"])
    assert (found.code, found.out) == (0, '{ "a": 1}\n')
    assert (await headrace("result", first["id"], "--json")).answer["response"] == {"a": 1}
    failed = await headrace("result", second["id"])
    assert (failed.code, "failed (timeout)" in failed.err) == (1, True)
    cancelled = await headrace("cancel", second["id"], "--json")
    assert cancelled.answer["cancelled"] is False


async def test_a_cancelled_batch_leaves_the_queues(
    environment: None, pool: Pool, headrace: Run, requests: Path
) -> None:
    batch = (await headrace("submit", requests, "--json")).answer["batch_id"]
    done = await headrace("cancel", batch, "--json")
    assert done.answer == {"batch_id": batch, "cancelled": 4, "stopping": 0}
    assert await pool.fetchval("SELECT count(*) FROM headrace.jobs WHERE state = 'cancelled'") == 4


async def test_usage_sums_every_call_by_what_is_asked_for(
    environment: None, pool: Pool, headrace: Run, requests: Path
) -> None:
    batch = (await headrace("submit", requests, "--tenant", "acme", "--json")).answer["batch_id"]
    ends = {1: End.answered(b"{}"), 2: End.refused(400, b"{}"), 3: End.lost()}
    await Endings(pool).end_batch(str(batch), ends.get)
    done = await headrace("usage", "--by", "model,tenant", "--suspense", "--json")
    answer = done.answer
    assert (answer["calls"], answer["prompt_tokens"], answer["completion_tokens"]) == (3, 10, 5)
    assert (answer["cost_nano_usd"], answer["suspense_nano_usd"]) == (1_000, 10_000)
    (group,) = done.rows("groups")
    assert (group["model"], group["tenant"], group["calls"]) == ("gpt-4o-mini", "acme", 3)
    assert [row["reason"] for row in done.rows("suspense")] == ["timeout"]
    assert (await headrace("usage", "--tenant", "other", "--json")).answer["calls"] == 0
    assert "gpt-4o-mini" in (await headrace("usage", "--by", "model")).out


async def test_budgets_are_set_shown_and_removed(environment: None, headrace: Run) -> None:
    assert "no budgets" in (await headrace("budgets", "show")).out
    set_one = await headrace("budgets", "set", "tenant:acme", "--limit", "5.00", "--window", "day", "--json")
    assert set_one.answer["limit_nano_usd"] == 5_000_000_000
    (budget,) = (await headrace("budgets", "show", "--json")).rows("budgets")
    assert (budget["scope"], budget["window"], budget["remaining_nano_usd"]) == (
        "tenant:acme",
        "day",
        5_000_000_000,
    )
    assert "tenant:acme" in (await headrace("budgets", "show")).out
    assert (await headrace("budgets", "remove", "tenant:acme", "--window", "day")).code == 0
    assert (await headrace("budgets", "show", "--json")).answer == {"budgets": []}


async def test_configurations_are_applied_and_rolled_back(environment: None, headrace: Run) -> None:
    for tokens in (100, 200):
        Path("headrace.toml").write_text(f"[defaults]\nmax_output_tokens = {tokens}\n")  # noqa: ASYNC240
        assert (await headrace("config", "apply")).code == 0
    assert (await headrace("config", "apply", "--json")).answer == {"version": 2, "changed": False}
    assert (await headrace("config", "rollback", "1", "--json")).answer == {"version": 3, "changed": True}
    shown = (await headrace("config", "show", "--json")).answer
    assert shown == {"version": 3, "configuration": {"defaults": {"max_output_tokens": 100}}}
    versions = (await headrace("config", "history", "--json")).rows("versions")
    assert [one["source"] for one in versions] == ["rollback to 1", "headrace.toml", "headrace.toml"]
