"""A file is quoted before it is run: the most its answers can cost, and what to expect."""

import json
from collections.abc import Collection
from pathlib import Path

import pytest

from headrace_producer.batch.expecting import Quote
from headrace_producer.batch.files import BatchFile
from headrace_producer.batch.lines import OpenAILines
from headrace_producer.batch.quote import Seen, nothing_seen
from headrace_producer.batch.submit import Submission, check_cost
from headrace_producer.batch.survey import Survey, survey_file
from headrace_producer.in_force import Snapshot
from headrace_shared.configuration import Configuration
from headrace_shared.errors import InvalidInput
from headrace_shared.ids import Tenant
from headrace_shared.money import NanoUSD
from headrace_shared.prices import PriceBook
from headrace_shared.request import Endpoint, prepare
from headrace_shared.sketches import Sketch, SketchKey

PRICES = {"input": "1", "output": "10"}


def configured(**sections: object) -> Snapshot:
    document = {"prices": {"openai/cheap": PRICES}, "defaults": {"max_output_tokens": 100}} | sections
    configuration = Configuration.from_document(document)
    return Snapshot(0, configuration, PriceBook(configuration))


def write(path: Path, bodies: list[dict[str, object]]) -> None:
    lines = [
        {"custom_id": f"row-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        for number, body in enumerate(bodies)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


async def survey(
    path: Path,
    snapshot: Snapshot,
    bodies: list[dict[str, object]],
    sample: int = 0,
    seen: Seen = nothing_seen,
) -> Survey:
    write(path, bodies)
    with BatchFile(path) as file:
        return await survey_file(file, OpenAILines(), snapshot, seen=seen, sample=sample, seed=file.digest())


async def seen_before(keys: Collection[SketchKey]) -> dict[SketchKey, Sketch]:
    """Every template and model of the file: answers of five tokens, prompts of a token for four bytes."""
    return {key: Sketch(50, 50, 0, 200, (0, 0, 0, 0, 0, 50)) for key in keys}


def body(content: str = "Hello", **more: object) -> dict[str, object]:
    return {"model": "cheap", "messages": [{"role": "user", "content": content}]} | more


async def test_the_worst_case_is_what_the_worker_would_hold(tmp_path: Path) -> None:
    snapshot = configured()
    bodies = [body("Hello " * 20, max_tokens=7, n=3), body("né", max_completion_tokens=1), body()]
    quote = (await survey(tmp_path / "f", snapshot, bodies)).quote
    held = 0
    for one in bodies:
        written = json.dumps(one, ensure_ascii=False, separators=(",", ":")).encode()
        request = prepare(written, Endpoint.CHAT_COMPLETIONS, "cheap", 100)
        held += request.input_bound * 1000 + request.output_bound * 10_000
    assert quote.most == held
    assert quote.most_output_tokens == 21 + 1 + 100
    assert quote.requests == 3


async def test_the_dearest_target_of_a_route_counts(tmp_path: Path) -> None:
    targets = [{"provider": "openai", "model": "cheap"}, {"provider": "openai", "model": "dear"}]
    prices = {"openai/cheap": PRICES, "openai/dear": {"input": "10", "output": "100"}}
    snapshot = configured(routes={"cheap": {"targets": targets}}, prices=prices)
    alone = (await survey(tmp_path / "f", configured(), [body()], seen=seen_before)).quote
    routed = (await survey(tmp_path / "f", snapshot, [body()], seen=seen_before)).quote
    assert routed.most == 10 * alone.most
    assert routed.expected == alone.expected > 5 * 10_000
    assert routed.expected < alone.most


async def test_what_was_never_seen_counts_at_its_worst_case(tmp_path: Path) -> None:
    quote = (await survey(tmp_path / "f", configured(), [body("word " * 100)] * 2)).quote
    assert quote.most == quote.expected == quote.p50 == quote.p90 > 0
    assert quote.expected_input_tokens == quote.most_input_tokens
    assert (quote.unknown, quote.known_by_template, quote.known_by_model) == (2, 0, 0)


def submission(ceiling: int | None) -> Submission:
    cost = None if ceiling is None else NanoUSD(ceiling)
    return Submission(Path("requests.jsonl"), OpenAILines(), Tenant("acme"), max_cost=cost)


def test_a_ceiling_that_one_request_could_exceed_by_itself_is_refused_with_both_figures() -> None:
    quote = Quote(requests=2, most=NanoUSD(4_000_000_000), dearest=NanoUSD(3_000_000_000))
    check_cost(submission(None), quote)
    check_cost(submission(3_000_000_000), quote)
    with pytest.raises(InvalidInput) as raised:
        check_cost(submission(2_999_999_999), quote)
    assert "could cost up to $3.00 by itself (all 2 up to $4.00)" in str(raised.value)
    assert "nothing was enqueued" in str(raised.value)


async def test_a_sample_is_the_same_each_time(tmp_path: Path) -> None:
    bodies = [body(f"Number {number}") for number in range(100)]
    first = await survey(tmp_path / "f", configured(), bodies, sample=10)
    second = await survey(tmp_path / "g", configured(), bodies, sample=10)
    assert first.sample == second.sample
    assert len(first.sample) == 10
    assert first.sample != frozenset(range(1, 11))
    assert first.sample <= frozenset(range(1, 101))


async def test_a_sample_larger_than_the_file_is_all_of_it(tmp_path: Path) -> None:
    surveyed = await survey(tmp_path / "f", configured(), [body(), body("B")], sample=10)
    assert surveyed.sample == {1, 2}
