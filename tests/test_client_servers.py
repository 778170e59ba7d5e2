"""Which servers a client uses when none are named."""

import asyncio
import os
import sys
from pathlib import Path

import pytest
from command_line import write_requests

from headrace_producer import Headrace
from headrace_shared.embedded import find_running

EXAMPLES = Path(__file__).parents[1] / "examples"
BODY = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello"}]}


async def test_clients_in_the_same_folder_join_its_servers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    first, second = Headrace.embedded(tmp_path), Headrace()
    await first.__aenter__()
    job = await first.enqueue("/v1/chat/completions", BODY)
    async with second:
        await first.__aexit__(None, None, None)
        assert (await second.get(job.id)).state == "queued"
        assert find_running(tmp_path) is not None
    assert find_running(tmp_path) is None
    async with first:
        assert (await first.get(job.id)).id == job.id


async def test_named_servers_come_before_the_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, postgres_url: str, redis_url: str
) -> None:
    monkeypatch.chdir(tmp_path)
    async with Headrace.embedded(tmp_path) as own, Headrace(postgres_url, redis_url) as other:
        await own.enqueue("/v1/chat/completions", BODY)
        assert (await other.list()).jobs == []


@pytest.mark.parametrize("example", [("submit_batch.py", "results.jsonl"), ("handlers.py",)])
async def test_an_example_without_servers_says_so_in_one_sentence(
    tmp_path: Path, example: tuple[str, ...]
) -> None:
    name, *others = example
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        EXAMPLES / name,
        write_requests(tmp_path / "requests.jsonl", 1),
        *others,
        cwd=tmp_path,
        env=os.environ,
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await process.communicate()
    assert process.returncode == 2
    (line,) = said.decode().splitlines()
    assert line.startswith("headrace: HEADRACE_POSTGRES_URL is not set: ")
    assert "run 'headrace up'" in line
