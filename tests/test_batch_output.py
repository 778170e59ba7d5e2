"""The output file and the error file are OpenAI's, in the order of the input, and whole or not there."""

import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import TypedDict

import pytest

from headrace_producer.batch.following import standing
from headrace_producer.batch.lines import OpenAILines
from headrace_producer.batch.output import check_paths, replacing, write_results
from headrace_producer.batch.progress import Lines
from headrace_producer.batch.submit import Submission, Submitter
from headrace_producer.connections import Connections, open_connections
from headrace_shared.errors import InvalidInput
from headrace_shared.ids import BatchId, Tenant
from headrace_shared.settings import Settings
from headrace_shared.store import batches
from headrace_shared.testing.endings import COST, HELD, USAGE, End, Endings

TENANT = Tenant("acme")
NOTHING_ELSE = dict.fromkeys(("type", "param", "code"))


class Response(TypedDict):
    status_code: int
    request_id: str | None
    body: dict[str, object]


class OutputLine(TypedDict):
    id: str
    custom_id: str
    response: Response | None
    error: dict[str, object] | None


@pytest.fixture
async def connections(environment: None) -> AsyncIterator[Connections]:
    async with open_connections(Settings()) as connections:
        yield connections


async def submit(connections: Connections, path: Path, count: int) -> BatchId:
    body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello"}]}
    rows = [
        {"custom_id": f"é-{n}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        for n in range(1, count + 1)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))  # noqa: ASYNC240
    submitted = await Submitter(connections, Lines()).submit(Submission(path, OpenAILines(), TENANT))
    return submitted.batch_id


async def write(connections: Connections, batch_id: BatchId, folder: Path, *, page: int = 100) -> None:
    with replacing(folder / "out") as out, replacing(folder / "err") as err:
        async with aclosing(batches.batch_results(connections.pool, batch_id, page=page)) as results:
            await write_results(results, out, err)


def lines(path: Path) -> list[OutputLine]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


async def test_answers_are_written_byte_for_byte_and_in_order(
    connections: Connections, tmp_path: Path
) -> None:
    batch_id = await submit(connections, tmp_path / "in", 5)
    ends = {n: End.answered(b'{ "n":  %d, "text": "caf\xc3\xa9 \\u00e9" }' % n) for n in range(1, 6)}
    for number in (4, 1, 5, 3, 2):
        await Endings(connections.pool).end_batch(batch_id, {number: ends[number]}.get)
    await write(connections, batch_id, tmp_path, page=2)
    written = (tmp_path / "out").read_bytes().splitlines()
    assert len(written) == 5
    for number, line in enumerate(written, start=1):
        assert b'"body":{ "n":  %d, "text": "caf\xc3\xa9 \\u00e9" }}' % number in line
    first = lines(tmp_path / "out")[0]
    assert first["id"].startswith("batch_req_")
    assert first["custom_id"] == "é-1"
    assert first["error"] is None
    response = first["response"]
    assert response is not None
    assert response["status_code"] == 200
    assert str(response["request_id"]).startswith("req_")
    assert (tmp_path / "err").read_bytes() == b""


async def test_an_answer_of_several_lines_stays_one_line(connections: Connections, tmp_path: Path) -> None:
    batch_id = await submit(connections, tmp_path / "in", 1)
    await Endings(connections.pool).end_batch(batch_id, lambda _: End.answered(b'{\r\n  "a": "b\\n"\n}\n'))
    await write(connections, batch_id, tmp_path)
    assert (tmp_path / "out").read_bytes().count(b"\n") == 1
    response = lines(tmp_path / "out")[0]["response"]
    assert response is not None
    assert response["body"] == {"a": "b\n"}


async def test_each_kind_of_failure_has_its_shape(connections: Connections, tmp_path: Path) -> None:
    batch_id = await submit(connections, tmp_path / "in", 5)
    kinds = {
        1: End.refused(400, b'{"error": {"message": "no", "code": "bad"}}'),
        2: End.refused(502, b"<html>\xff\n</html>"),
        3: End.lost("no answer came"),
        4: End.filtered(b'{"choices": [{"finish_reason": "content_filter"}]}'),
    }
    await Endings(connections.pool).end_batch(batch_id, kinds.get)
    async with aclosing(batches.cancel_batch(connections.pool, batch_id)) as pages:
        assert [len(page) async for page in pages] == [1]
    await write(connections, batch_id, tmp_path)
    refused, page, lost, filtered, cancelled = (
        (line["response"], line["error"]) for line in lines(tmp_path / "err")
    )
    assert (tmp_path / "out").read_bytes() == b""
    assert refused[0] is not None
    assert refused[0]["status_code"] == 400
    assert refused[0]["body"] == {"error": {"message": "no", "code": "bad"}}
    assert refused[1] is None
    assert page[0] is not None
    assert page[0]["body"]["error"] == {"message": "<html>\ufffd\n</html>"} | NOTHING_ELSE
    assert lost == (None, {"code": "timeout", "message": "no answer came"})
    assert filtered[0] is not None
    assert filtered[0]["body"] == {"choices": [{"finish_reason": "content_filter"}]}
    assert filtered[1] == {"code": "content_filter", "message": "the content filter stopped it"}
    assert cancelled == (None, {"code": "cancelled", "message": "its batch was cancelled"})


async def test_progress_and_cost_count_every_job_once(connections: Connections, tmp_path: Path) -> None:
    batch_id = await submit(connections, tmp_path / "in", 4)
    await Endings(connections.pool).end_batch(
        batch_id, {1: End.answered(b"{}"), 2: End.filtered(b"{}"), 3: End.lost()}.get
    )
    now = await standing(connections, batch_id, 4)
    progress = batches.Progress(enqueued=4, succeeded=1, failed=2, running=0, retried=0)
    assert now.progress == progress
    assert not now.finished
    assert (now.cost.prompt_tokens, now.cost.completion_tokens) == (
        2 * USAGE.prompt_tokens,
        2 * USAGE.completion_tokens,
    )
    assert (now.cost.cost, now.cost.suspense) == (2 * COST, HELD)


async def test_a_cancelled_batch_is_cancelled_once(connections: Connections, tmp_path: Path) -> None:
    batch_id = await submit(connections, tmp_path / "in", 3)
    await Endings(connections.pool).end_batch(batch_id, {2: End.answered(b"{}")}.get)
    pages = [page async for page in batches.cancel_batch(connections.pool, batch_id)]
    assert [job.state for page in pages for job in page] == ["cancelled"] * 2
    states = [result.state async for result in batches.batch_results(connections.pool, batch_id)]
    assert states == ["cancelled", "succeeded", "cancelled"]
    assert [page async for page in batches.cancel_batch(connections.pool, batch_id)] == []


def test_a_file_that_could_not_be_finished_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(target) as stream:  # noqa: PT012
        assert stream is not None
        stream.write(b"new")
        raise ZeroDivisionError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_what_is_no_file_is_written_to_as_it_is() -> None:
    with replacing(Path("/dev/null")) as stream:
        assert stream is not None
        stream.write(b"gone")
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize(
    ("output", "errors", "said"),
    [
        ("in", None, "overwrite itself"),
        ("out", "out", "overwrite itself"),
        ("missing/out", None, "there is no directory"),
        (".", None, "it is a directory"),
    ],
)
def test_places_that_cannot_be_written_are_refused_first(
    tmp_path: Path, output: str, errors: str | None, said: str
) -> None:
    (tmp_path / "in").write_text("")
    with pytest.raises(InvalidInput, match=said):
        check_paths(tmp_path / "in", tmp_path / output, tmp_path / errors if errors else None)
