"""What requests of a file have in common is checked once, and it changes no answer."""

import asyncio
import gc
import json
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace_producer.batch.files import BatchFile
from headrace_producer.batch.lines import OpenAILines
from headrace_producer.batch.quote import Seen
from headrace_producer.batch.shapes import DocumentChecker
from headrace_producer.batch.survey import survey_file
from headrace_producer.in_force import Snapshot
from headrace_shared.configuration import Configuration
from headrace_shared.errors import HeadraceError, InvalidBatchFile
from headrace_shared.fingerprints import fingerprints
from headrace_shared.jsonvalue import Json, JsonObject
from headrace_shared.prices import PriceBook
from headrace_shared.request import CheckedDocument, Endpoint, check_document
from headrace_shared.sketches import Sketch, SketchKey

CHAT = Endpoint.CHAT_COMPLETIONS
MOST = 300


def document(*texts: str, **more: Json) -> JsonObject:
    said: list[Json] = [{"role": "user", "content": text} for text in texts]
    return {"model": "m", "messages": said, **more}


def answer(check: Callable[[], CheckedDocument]) -> object:
    try:
        return check()
    except HeadraceError as error:
        return type(error), error.message


def answers(checker: DocumentChecker, one: JsonObject, endpoint: str = CHAT) -> tuple[object, object]:
    """What a checker says that may have seen the like, and what is said of a document by itself."""
    return (
        answer(lambda: checker.check(endpoint, one)),
        answer(lambda: check_document(endpoint, one, max_body_bytes=MOST)),
    )


@pytest.mark.parametrize(
    "texts",
    [
        ("", ""),
        ('"quoted" \\ and\nbroken', "\x1f\x7f"),
        ("né", "\U0001f600"),
        ("a\0b", "c"),
        ("\\u0000", "c"),
        ("a", "\ud83d"),
        ("\ud83d", "\ude00"),
        ("a\0b", "\ud83d"),
        ("x" * MOST, ""),
        ("x" * 150, "x" * 150),
    ],
)
def test_a_document_is_checked_as_if_none_had_its_shape_before(texts: tuple[str, str]) -> None:
    checker = DocumentChecker(max_body_bytes=MOST)
    checker.check(CHAT, document("first", "of its shape", n=2))
    found, alone = answers(checker, document(*texts, n=2))
    assert found == alone


@pytest.mark.parametrize(
    "other",
    [
        document("a", n=True),
        document("a", n=1.0),
        document("a", n="1"),
        document("a", n=2),
        document("a", n=1, max_tokens=5),
        document("a", "b", n=1),
        document("a", n=1) | {"model": ""},
        document("a", n=1) | {"messages": []},
        document("a", n=1) | {"messages": ["user"]},
        document("a", n=1) | {"messages": [{"role": "user", "content": "a", "audio": {"id": "x"}}]},
        document("a", n=1) | {"messages": [{"role": "user", "content": [{"type": "file"}]}]},
    ],
)
def test_only_what_is_said_may_differ_within_a_shape(other: JsonObject) -> None:
    checker = DocumentChecker(max_body_bytes=MOST)
    checker.check(CHAT, document("a", n=1))
    found, alone = answers(checker, other)
    assert found == alone
    assert found != answers(checker, document("a", n=1))[1]
    for endpoint in ("/v1/chat/completion", Endpoint.RESPONSES):
        found, alone = answers(checker, document("a", n=1), endpoint)
        assert found == alone


VALUES: list[Json] = [None, True, False, 0, 1, 1.0, -0.0, 1e16, 200, "text", [], {}, float("inf"), "\ud800"]
SETTINGS = st.dictionaries(
    st.sampled_from(["n", "stream", "max_tokens", "tools", "temperature", "response_format", "seed"]),
    st.sampled_from(VALUES),
    max_size=2,
)
TEXTS = st.lists(st.text(st.characters() | st.sampled_from('\0\ud800\udc00\\u"'), max_size=8), max_size=2)


@settings(max_examples=300)
@given(st.lists(st.tuples(TEXTS, SETTINGS), min_size=2, max_size=8))
def test_documents_in_any_order_are_checked_as_each_by_itself(
    several: list[tuple[list[str], dict[str, Json]]],
) -> None:
    checker = DocumentChecker(max_body_bytes=MOST)
    for texts, more in several + several[::-1]:
        found, alone = answers(checker, document(*texts, **more))
        assert found == alone


def test_settings_that_only_compare_equal_are_those_of_different_templates() -> None:
    found = [fingerprints(CHAT, document("Hello", top_p=value)) for value in (1, 1.0, True, "1", 1)]
    assert len(set(found)) == 4
    assert found[0] == found[-1]
    one, other = document("Hello", top_p=1, n=1), document("Hello", n=1, top_p=1)
    assert fingerprints(CHAT, one) == fingerprints(CHAT, other)


async def test_surveys_that_overlap_leave_the_collector_as_it_was(tmp_path: Path) -> None:
    before, configuration = gc.get_threshold(), Configuration.default()
    snapshot = Snapshot(0, configuration, PriceBook(configuration))
    line = {
        "custom_id": "a",
        "method": "POST",
        "url": CHAT,
        "body": document("Hello") | {"model": "gpt-4o-mini"},
    }
    (tmp_path / "f").write_text(json.dumps(line))
    during: list[int] = []

    async def survey(seen: Seen) -> None:
        with BatchFile(tmp_path / "f") as file:
            await survey_file(file, OpenAILines(), snapshot, seen=seen)

    async with asyncio.TaskGroup() as group, asyncio.timeout(30):
        both = asyncio.Barrier(2)
        first_is_over = asyncio.Event()

        async def leave_first(_keys: Collection[SketchKey]) -> dict[SketchKey, Sketch]:
            await both.wait()
            return {}

        async def leave_last(_keys: Collection[SketchKey]) -> dict[SketchKey, Sketch]:
            await both.wait()
            await first_is_over.wait()
            during.append(gc.get_threshold()[0])
            return {}

        first = group.create_task(survey(leave_first))
        group.create_task(survey(leave_last))
        await first
        first_is_over.set()
    assert len(during) == 1
    assert during[0] > before[0]
    assert gc.get_threshold() == before


@pytest.mark.parametrize("model", ["gpt-4o-mini", "nobody knows it"])
async def test_garbage_is_collected_as_before_when_a_file_was_looked_through(
    tmp_path: Path, model: str
) -> None:
    path, before, configuration = tmp_path / "f", gc.get_threshold(), Configuration.default()
    body = document("Hello") | {"model": model}
    path.write_text(json.dumps({"custom_id": "a", "method": "POST", "url": CHAT, "body": body}))
    during: list[int] = []

    async def seen(_keys: Collection[SketchKey]) -> dict[SketchKey, Sketch]:
        during.append(gc.get_threshold()[0])
        return {}

    snapshot = Snapshot(0, configuration, PriceBook(configuration))
    with BatchFile(path) as file, suppress(InvalidBatchFile):
        await survey_file(file, OpenAILines(), snapshot, seen=seen)
    assert [most > before[0] for most in during] == [True] * (model == "gpt-4o-mini")
    assert gc.get_threshold() == before
