"""What the commands do: a batch from its submission to its files, jobs, usage, budgets, configurations."""

import asyncio
import json
from datetime import timedelta
from pathlib import Path

from command_line import Command

from headrace_shared.ids import WorkerId
from headrace_shared.store import feed
from headrace_shared.store.pool import Pool
from headrace_shared.testing.endings import COST, End, Endings

LONG = timedelta(hours=1)


async def test_a_batch_is_followed_to_its_end(
    environment: None, pool: Pool, command: Command, requests: Path
) -> None:
    submitted = await command("submit", requests, "--tenant", "acme", "--json")
    assert submitted.code == 0
    batch = str(submitted.answer["batch_id"])
    assert {name: submitted.answer[name] for name in ("total", "succeeded", "failed", "cost_nano_usd")} == {
        "total": 4,
        "succeeded": 0,
        "failed": 0,
        "cost_nano_usd": 0,
    }
    await feed.register_worker(pool, WorkerId("w"), host="h", slots=1, lanes=("batch",), alive=LONG)
    waiting = asyncio.create_task(command("submit", requests, "--tenant", "acme", "--wait", "--json"))
    await Endings(pool).end_batch(batch, lambda line: End.answered(b'{"n": %d}' % line))
    done = await waiting
    assert done.code == 0
    assert done.answer["succeeded"] == 4
    assert done.answer["cost_nano_usd"] == 4 * COST
    written = await command("submit", requests, "--tenant", "acme", "-o", "out", "--errors", "err")
    assert written.code == 0
    assert len(Path("out").read_bytes().splitlines()) == 4  # noqa: ASYNC240
    assert Path("err").read_bytes() == b""  # noqa: ASYNC240
    printed = await command("submit", requests, "--tenant", "acme")
    assert [json.loads(line)["response"]["body"] for line in printed.out.splitlines()] == [
        {"n": number} for number in range(1, 5)
    ]


async def test_failures_are_exit_1_and_named(
    environment: None, pool: Pool, command: Command, requests: Path
) -> None:
    batch = (await command("submit", requests, "--json")).answer["batch_id"]
    await Endings(pool).end_batch(
        str(batch), lambda line: End.lost("\x1b[31mred\x1b[0m") if line == 2 else End.answered(b"{}")
    )
    done = await command("result", batch, "-o", "out")
    assert done.code == 1
    assert "line 2 (row-2) timeout: red" in done.err
    assert (await command("submit", requests, "--wait", "--json")).code == 1
    assert (await command("status", batch, "--json")).answer["failed"] == 1


async def test_one_job_has_a_status_and_a_result(
    environment: None, pool: Pool, command: Command, requests: Path
) -> None:
    await command("submit", requests)
    first, second = await pool.fetch("SELECT id FROM headrace.jobs ORDER BY line LIMIT 2")
    queued = await command("result", first["id"])
    assert (queued.code, "it is queued" in queued.err) == (1, True)
    await Endings(pool).end([(first["id"], End.answered(b'{ "a": 1}')), (second["id"], End.lost())])
    assert (await command("status", first["id"], "--json")).answer["status"] == "succeeded"
    found = await command("result", first["id"])
    assert (found.code, found.out) == (0, '{ "a": 1}\n')
    assert (await command("result", first["id"], "--json")).answer["response"] == {"a": 1}
    failed = await command("result", second["id"])
    assert (failed.code, "failed (timeout)" in failed.err) == (1, True)
    cancelled = await command("cancel", second["id"], "--json")
    assert cancelled.answer["cancelled"] is False


async def test_a_cancelled_batch_leaves_the_queues(
    environment: None, pool: Pool, command: Command, requests: Path
) -> None:
    batch = (await command("submit", requests, "--json")).answer["batch_id"]
    done = await command("cancel", batch, "--json")
    assert done.answer == {"batch_id": batch, "cancelled": 4, "stopping": 0}
    assert await pool.fetchval("SELECT count(*) FROM headrace.jobs WHERE state = 'cancelled'") == 4


async def test_usage_sums_every_call_by_what_is_asked_for(
    environment: None, pool: Pool, command: Command, requests: Path
) -> None:
    batch = (await command("submit", requests, "--tenant", "acme", "--json")).answer["batch_id"]
    ends = {1: End.answered(b"{}"), 2: End.refused(400, b"{}"), 3: End.lost()}
    await Endings(pool).end_batch(str(batch), ends.get)
    done = await command("usage", "--by", "model,tenant", "--suspense", "--json")
    answer = done.answer
    assert (answer["calls"], answer["prompt_tokens"], answer["completion_tokens"]) == (3, 10, 5)
    assert (answer["cost_nano_usd"], answer["suspense_nano_usd"]) == (1_000, 10_000)
    (group,) = done.rows("groups")
    assert (group["model"], group["tenant"], group["calls"]) == ("gpt-4o-mini", "acme", 3)
    assert [row["reason"] for row in done.rows("suspense")] == ["timeout"]
    assert (await command("usage", "--tenant", "other", "--json")).answer["calls"] == 0
    assert "gpt-4o-mini" in (await command("usage", "--by", "model")).out


async def test_budgets_are_set_shown_and_removed(environment: None, command: Command) -> None:
    assert "no budgets" in (await command("budgets", "show")).out
    set_one = await command("budgets", "set", "tenant:acme", "--limit", "5.00", "--window", "day", "--json")
    assert set_one.answer["limit_nano_usd"] == 5_000_000_000
    (budget,) = (await command("budgets", "show", "--json")).rows("budgets")
    assert (budget["scope"], budget["window"], budget["remaining_nano_usd"]) == (
        "tenant:acme",
        "day",
        5_000_000_000,
    )
    assert "tenant:acme" in (await command("budgets", "show")).out
    assert (await command("budgets", "remove", "tenant:acme", "--window", "day")).code == 0
    assert (await command("budgets", "show", "--json")).answer == {"budgets": []}


async def test_configurations_are_applied_and_rolled_back(environment: None, command: Command) -> None:
    for tokens in (100, 200):
        Path("headrace.toml").write_text(f"[defaults]\nmax_output_tokens = {tokens}\n")  # noqa: ASYNC240
        assert (await command("config", "apply")).code == 0
    assert (await command("config", "apply", "--json")).answer == {"version": 2, "changed": False}
    assert (await command("config", "rollback", "1", "--json")).answer == {"version": 3, "changed": True}
    shown = (await command("config", "show", "--json")).answer
    assert shown == {"version": 3, "configuration": {"defaults": {"max_output_tokens": 100}}}
    versions = (await command("config", "history", "--json")).rows("versions")
    assert [one["source"] for one in versions] == ["rollback to 1", "headrace.toml", "headrace.toml"]
