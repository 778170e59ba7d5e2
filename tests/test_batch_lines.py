"""Every line of an input file is checked as the job it would become, and each bad one is named."""

import json
from pathlib import Path
from typing import cast

import pytest

from headrace_producer.batch.files import BatchFile
from headrace_producer.batch.lines import BadLine, BatchRequest, Format, OpenAILines, read_requests
from headrace_producer.batch.survey import survey_file
from headrace_producer.batch.templates import Template
from headrace_producer.in_force import Snapshot
from headrace_shared.configuration import Configuration
from headrace_shared.errors import InvalidBatchFile, InvalidInput
from headrace_shared.prices import PriceBook

CHAT = "/v1/chat/completions"
BODY = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture
def snapshot() -> Snapshot:
    configuration = Configuration.from_document({"defaults": {"max_body_bytes": 2000}})
    return Snapshot(0, configuration, PriceBook(configuration))


def line(**changes: object) -> str:
    whole = {"custom_id": "a", "method": "POST", "url": CHAT, "body": BODY} | changes
    return json.dumps({name: value for name, value in whole.items() if value is not None})


def read(
    path: Path, snapshot: Snapshot, content: str | bytes, form: Format | None = None
) -> list[BatchRequest | BadLine]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with BatchFile(path) as file:
        return list(read_requests(file, form or OpenAILines(), snapshot))


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ('{"custom_id": ', "the line is not JSON (Expecting value, column 15)"),
        ("[1]", "the line must be a JSON object"),
        (line(custom_id=None), "custom_id: is missing"),
        (line(custom_id=7), "custom_id: must be a string of 1 to 512 printable characters"),
        (line(custom_id="a\0b"), "custom_id: must be a string of 1 to 512 printable characters"),
        (line(custom_id="first"), "custom_id: 'first' is on line 1 already"),
        (line(method=None), "method: is missing"),
        (line(method="GET"), 'method: must be "POST"'),
        (line(url="/v1/chat/completion"), "did you mean /v1/chat/completions?"),
        (line(url="/v1/chat/completion"), "url: '/v1/chat/completion' is not known"),
        (line(body="{}"), "body: must be a JSON object"),
        (line(body=BODY | {"stream": True}), "body.stream: must be absent or false"),
        (line(body={"model": "gpt-4o-mini"}), "body.messages: must be a list of at least one message"),
        (line(body=BODY | {"model": "nobody-knows-1"}), "No price is known for openai/nobody-knows-1"),
        (line(body=BODY | {"user": "x" * 2000}), "more than the 2,000 that defaults.max_body_bytes allows"),
        (line(custom_id="x" * 100_000), "the line is longer than 77,536 bytes"),
        ('{"custom_id": "\ud800"}'.encode(errors="surrogatepass").decode("latin-1"), "missing"),
    ],
)
def test_a_bad_line_is_named_with_its_number_and_reason(
    tmp_path: Path, snapshot: Snapshot, bad: str, said: str
) -> None:
    found = read(tmp_path / "f", snapshot, f"{line(custom_id='first')}\n\n{bad}\n{line(custom_id='last')}\n")
    kinds = [type(one) for one in found]
    assert kinds == [BatchRequest, BadLine, BatchRequest]
    assert isinstance(found[1], BadLine)
    assert found[1].line == 3
    assert said in found[1].reason
    assert found[2].line == 4


async def test_all_bad_lines_are_reported_together(tmp_path: Path, snapshot: Snapshot) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text("\n".join(["{", line(), "nothing", line(), line(method="PUT", custom_id="c")]))
    with BatchFile(path) as file, pytest.raises(InvalidBatchFile) as raised:
        await survey_file(file, OpenAILines(), snapshot)
    assert [number for number, _ in raised.value.problems] == [1, 3, 4, 5]
    assert "4 bad lines, nothing was enqueued" in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf\n"])
async def test_a_file_without_requests_is_refused(tmp_path: Path, snapshot: Snapshot, content: bytes) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_bytes(content)
    with BatchFile(path) as file, pytest.raises(InvalidInput, match="has no requests"):
        await survey_file(file, OpenAILines(), snapshot)


def test_a_byte_order_mark_and_carriage_returns_are_no_content(tmp_path: Path, snapshot: Snapshot) -> None:
    found = read(tmp_path / "f", snapshot, b"\xef\xbb\xbf" + f"{line()}\r\n\r\n".encode())
    assert [one.line for one in found if isinstance(one, BatchRequest)] == [1]


def test_a_last_line_needs_no_end(tmp_path: Path, snapshot: Snapshot) -> None:
    found = read(tmp_path / "f", snapshot, line())
    assert [type(one) for one in found] == [BatchRequest]


def test_a_file_that_changes_between_two_readings_is_noticed(tmp_path: Path, snapshot: Snapshot) -> None:
    path = tmp_path / "f"
    path.write_text(line())
    with BatchFile(path) as file:
        file.digest()
        path.write_text(line() + "\n" + line(custom_id="b"))
        with pytest.raises(InvalidInput, match="changed while it was read"):
            list(read_requests(file, OpenAILines(), snapshot))


def prompts(found: list[BatchRequest | BadLine]) -> list[tuple[str, object]]:
    return [
        (one.custom_id, said["content"])
        for one in found
        if isinstance(one, BatchRequest)
        for said in cast("list[dict[str, object]]", one.document["messages"])
    ]


def test_a_template_makes_a_request_of_each_csv_record(tmp_path: Path, snapshot: Snapshot) -> None:
    form = Template("Sum up {{once}}: {text}", model="gpt-4o-mini", id_field="id")
    content = 'id,text\n7,plain\n8,"two\nlines, and ""quotes"""\n'
    found = read(tmp_path / "f.csv", snapshot, content, form)
    assert prompts(found) == [("7", "Sum up {once}: plain"), ("8", 'Sum up {once}: two\nlines, and "quotes"')]
    assert [one.line for one in found] == [2, 3]


def test_bad_csv_records_are_named_by_the_line_they_begin_on(tmp_path: Path, snapshot: Snapshot) -> None:
    form = Template("{text}", model="gpt-4o-mini", id_field="id")
    content = b'id,text\n1,"a\nb"\n2\n3,\xff\n1,again\n'
    found = read(tmp_path / "f.csv", snapshot, content, form)
    reasons = {one.line: one.reason for one in found if isinstance(one, BadLine)}
    assert reasons == {
        4: "the record has 1 fields, the header has 2",
        5: "the record is not UTF-8",
        6: "custom_id: '1' is on line 2 already",
    }


def test_a_template_reads_json_records_and_numbers_them_itself(tmp_path: Path, snapshot: Snapshot) -> None:
    form = Template("{a} and {b}", model="gpt-4o-mini")
    found = read(tmp_path / "f.jsonl", snapshot, '{"a": 1.50, "b": ["x"]}\n{"a": "y"}\n', form)
    assert prompts(found) == [("line-1", '1.5 and ["x"]')]
    assert found[1] == BadLine(2, "b: the record has no such field, only a")


@pytest.mark.parametrize("text", ["{", "a } b", "{}"])
def test_a_template_with_a_lonely_brace_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="names no field"):
        Template(text, model="gpt-4o-mini")
