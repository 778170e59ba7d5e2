"""The command line: exit codes, one sentence for what is wrong, one JSON object where it is asked for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Command, Done

from headrace_producer.console import plain
from headrace_shared.store.migrate import migrations
from headrace_shared.store.pool import Pool


def is_one_sentence(done: Done) -> bool:
    (line,) = done.err.splitlines()
    return line.startswith("headrace: ") and "Traceback" not in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("submit", "nowhere.jsonl"), "nowhere.jsonl cannot be read"),
        (("submit", "."), ""),
        (("submit", "requests.jsonl", "--wiat"), "--wiat"),
        (("submit",), "FILE"),
        (("submit", "requests.jsonl", "--max-cost", "much"), "'much' is not an amount of dollars"),
        (("submit", "requests.jsonl", "--max-cost", "0.000001"), "could cost up to"),
        (("submit", "requests.jsonl", "--lane", "fast"), "'fast' is not one of interactive"),
        (("submit", "requests.jsonl", "--tenant", "a b"), "tenant"),
        (("submit", "requests.jsonl", "--webhook", "http://10.0.0.1/"), "webhook"),
        (("submit", "requests.jsonl", "--template", "{a}"), "--template needs --model"),
        (("submit", "requests.jsonl", "--model", "m"), "belong to --template"),
        (("submit", "requests.jsonl", "-o", "requests.jsonl"), "overwrite itself"),
        (("status", "7"), "'7' is not the id"),
        (("status", "01a1fd00-06fc-7a5b-9a04-371f4f41bcbf"), "no job and no batch 01a1fd00"),
        (("result", "01a1fd00-06fc-7a5b-9a04-371f4f41bcbf"), "no job and no batch"),
        (("cancel", "01a1fd00-06fc-7a5b-9a04-371f4f41bcbf"), "no job and no batch"),
        (("config", "apply", "nowhere.toml"), "nowhere.toml: cannot be read"),
        (("config", "rollback", "9"), "version 9: there is no such configuration"),
        (("budgets", "set", "everybody", "--limit", "1"), "'everybody' is not a scope"),
        (("budgets", "set", "global"), "--limit"),
        (("budgets", "set", "global", "--limit", "-1"), "not an amount"),
        (("budgets", "set", "global", "--limit", "1", "--window", "year"), "year"),
        (("budgets", "remove", "tenant:acme"), "no budget of tenant:acme in total"),
        (("usage", "--by", "month"), "--by: 'month'"),
        (("up",), "HEADRACE_POSTGRES_URL: is set"),
        (("dance",), "dance"),
    ],
)
async def test_bad_input_is_one_sentence_and_exit_2(
    environment: None, command: Command, requests: Path, arguments: tuple[str, ...], said: str
) -> None:
    done = await command(*arguments)
    assert done.code == 2
    assert is_one_sentence(done)
    assert said in done.err
    assert done.out == ""


@pytest.mark.parametrize(
    ("arguments", "problem", "helpful"),
    [
        (("budgets", "set", "global"), "Missing option '--limit'", "headrace budgets set"),
        (
            ("budgets", "set", "global", "--limit", "1", "--window", "year"),
            "Invalid value for '--window': 'year' is not one of 'total', 'day', 'week', 'month'",
            "headrace budgets set",
        ),
        (("budgets", "sett"), "No such command 'sett'. Did you mean 'set'?", "headrace budgets"),
        (("up", "--workers", "70"), "Invalid value for '--workers': must be less than", "headrace up"),
        (("dance",), "No such command 'dance'", "headrace"),
        (("--dance",), "No such option: --dance", "headrace"),
    ],
)
async def test_bad_input_names_the_whole_command_that_explains_it(
    command: Command, arguments: tuple[str, ...], problem: str, helpful: str
) -> None:
    said = (await command(*arguments)).err
    assert said.startswith(f"headrace: {problem}")
    assert said.endswith(f" (see '{helpful} --help').\n")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (("HEADRACE_POSTGRES_URL", None), "HEADRACE_POSTGRES_URL is not set"),
        (("HEADRACE_POSTGRES_URL", "postgresql://localhost:1/none"), "cannot be reached"),
        (("HEADRACE_POSTGRES_URL", "mysql://localhost/"), "must begin with postgresql://"),
        (("HEADRACE_REDIS_URL", None), "HEADRACE_REDIS_URL is not set"),
        (("HEADRACE_CONCURRENCY", "many"), "HEADRACE_CONCURRENCY"),
    ],
)
async def test_servers_that_cannot_be_used_are_one_sentence_and_exit_2(
    environment: None,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    setting: tuple[str, str | None],
    said: str,
) -> None:
    variable, value = setting
    monkeypatch.delenv(variable, raising=False)
    if value is not None:
        monkeypatch.setenv(variable, value)
    done = await command("budgets", "set", "global", "--limit", "1")
    assert (done.code, is_one_sentence(done)) == (2, True)
    assert said in done.err


async def test_a_budget_is_set_without_redis(
    environment: None, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (await command("budgets", "set", "global", "--limit", "2", "--json")).answer
    monkeypatch.setenv("HEADRACE_REDIS_URL", "unix:///nowhere.sock")
    assert (await command("budgets", "set", "global", "--limit", "1", "--json")).code == 0
    assert before["limit_nano_usd"] == 2_000_000_000


async def test_a_database_without_the_schema_says_what_to_run(
    empty_postgres_url: str, redis_url: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_POSTGRES_URL", empty_postgres_url)
    monkeypatch.setenv("HEADRACE_REDIS_URL", redis_url)
    for arguments in (("usage",), ("migrate", "--check")):
        done = await command(*arguments)
        assert (done.code, is_one_sentence(done)) == (2, True)
        assert "run 'headrace migrate'" in done.err
    assert (await command("migrate", "--json")).answer["applied"] == [one.name for one in migrations()]
    assert (await command("migrate", "--check", "--json")).answer == {
        "version": migrations()[-1].version,
        "applied": [],
    }


async def test_every_bad_line_is_printed_and_nothing_is_enqueued(
    environment: None, pool: Pool, command: Command, requests: Path
) -> None:
    requests.write_text("{\n" + requests.read_text() + "[]\n")  # noqa: ASYNC240
    done = await command("submit", requests, "--json")
    assert done.code == 2
    first, second, last = done.err.splitlines()
    assert first.startswith(f"{requests}:1: the line is not JSON")
    assert second == f"{requests}:6: the line must be a JSON object"
    assert last == f"headrace: {requests}: 2 bad lines, nothing was enqueued."
    assert "2 bad lines" in str(done.answer["error"])
    assert await pool.fetchval("SELECT count(*) FROM headrace.batches") == 0


async def test_a_dry_run_quotes_without_servers(command: Command, requests: Path) -> None:
    done = await command("submit", requests, "--dry-run", "--json")
    assert done.code == 0
    assert done.answer["total"] == 4
    assert "built-in configuration" in done.err
    assert (await command("submit", requests, "--dry-run", "--max-cost", "0.01")).code == 0
    refused = await command("submit", requests, "--dry-run", "--max-cost", "0.0001")
    assert (refused.code, "could cost up to" in refused.err) == (2, True)


def test_the_process_ends_with_the_code_and_without_colour(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")}
    command = [sys.executable, "-m", "headrace_producer", "usage"]
    done = subprocess.run(  # noqa: S603
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("headrace: HEADRACE_POSTGRES_URL is not set")
    assert "\x1b" not in done.stderr


def test_help_names_the_commands_of_other_parts() -> None:
    command = [sys.executable, "-m", "headrace_producer", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0
    for name in ("submit", "worker", "simulate-provider", "budgets", "up"):
        assert f"  {name} " in done.stdout


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("\x1b[2J\x1b[1;31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07after", "after"),
        ("\x1b]52;c;Y2xpcA==\x1b\\after", "after"),
        ("a\rb\x08c\x7f\x9b31m", "abc31m"),
        ("tab\tline\n", "tab\tline\n"),
        ("\u202eevil", "evil"),
        ("\x1b", ""),
    ],
)
def test_what_a_terminal_would_obey_is_taken_out(text: str, left: str) -> None:
    assert plain(text) == left


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--lane", "nosuch", "lane: 'nosuch' is not one of interactive, default, batch"),
        ("--webhook", "http://10.0.0.1/", "webhook: "),
        ("--deadline", "2020-05-01T12:00Z", "deadline: 2020-05-01 12:00:00 UTC has passed"),
    ],
)
async def test_a_quote_refuses_what_the_submission_would(
    command: Command, requests: Path, option: str, value: str, said: str
) -> None:
    refused = await command("submit", requests, "--dry-run", option, value)
    assert (refused.code, refused.out) == (2, "")
    assert refused.err.splitlines()[-1].startswith(f"headrace: {said}")
