"""Answers' lengths are learnt by template and model, and what a batch will cost follows from them."""

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from datetime import timedelta
from pathlib import Path
from typing import cast

import pytest
from command_line import Command

from headrace_producer.batch.expecting import KNOWN_CALLS, Quote
from headrace_producer.batch.lines import BatchRequest
from headrace_producer.batch.quote import Quoter, Seen
from headrace_producer.in_force import Snapshot
from headrace_shared.configuration import Configuration
from headrace_shared.dispatch.dispatch import Dispatch
from headrace_shared.fingerprints import fingerprints
from headrace_shared.ids import RouteName
from headrace_shared.jsonvalue import JsonObject, write_json
from headrace_shared.prices import PriceBook
from headrace_shared.request import Endpoint, check_document
from headrace_shared.routes import Target
from headrace_shared.sketches import Collected, Sketch, SketchKey, bucket_of, middle_of
from headrace_shared.store import lengths
from headrace_shared.store.pool import Pool
from headrace_shared.testing.jobs import Jobs
from headrace_shared.testing.simulated_provider import SimulatedProvider
from headrace_shared.usage import Usage
from headrace_workers import lengths as lengths_module
from headrace_workers.lengths import ENOUGH, Lengths
from headrace_workers.testing import running_worker

CHAT = Endpoint.CHAT_COMPLETIONS
TARGET = Target("openai", "cheap")
LONG = "Sum up the following text in a sentence, for a reader in a hurry, please: {}"
PARTED = "Sum up the following: in parts"
LONGEST = 4000
PRICE = 10_000
"""Nano-USD of an output token; the prompt is free, so that a cost is a number of answered tokens."""


def request(prompt: str = "Sum up the following: {}", number: int = 0, **more: object) -> BatchRequest:
    document = cast(
        "JsonObject",
        {"model": "cheap", "messages": [{"role": "user", "content": prompt.format(number)}]} | more,
    )
    checked = check_document(CHAT, document, max_body_bytes=10**6)
    return BatchRequest(number, str(number), checked, document, RouteName("cheap"))


def snapshot() -> Snapshot:
    document = {
        "prices": {"openai/cheap": {"input": "0", "output": "10"}},
        "defaults": {"max_output_tokens": LONGEST},
    }
    configuration = Configuration.from_document(document)
    return Snapshot(0, configuration, PriceBook(configuration))


def keys_of(one: BatchRequest) -> tuple[SketchKey, SketchKey, SketchKey]:
    """Of the opening that all requests of its prompt share, of its settings alone, and of the model."""
    found = fingerprints(one.checked.endpoint, one.document)
    shared, settings = (
        SketchKey(TARGET.provider, TARGET.model, template) for template in (found[1], found[-1])
    )
    return shared, settings, SketchKey(TARGET.provider, TARGET.model)


def sketch_of(answers: Collection[int]) -> Sketch:
    collected = Collected()
    for tokens in answers:
        collected.add(Usage(100, 0, tokens, 0), 300)
    return collected.sketch()


def knowing(known: Mapping[SketchKey, Sketch]) -> Seen:
    async def seen(keys: Collection[SketchKey]) -> Mapping[SketchKey, Sketch]:
        return {key: sketch for key, sketch in known.items() if key in keys}

    return seen


async def quote(requests: Collection[BatchRequest], known: Mapping[SketchKey, Sketch]) -> Quote:
    quoter = Quoter(snapshot())
    for one in requests:
        quoter.add(one)
    return await quoter.quote(knowing(known))


def lognormal(seed: int, median: float, sigma: float) -> Callable[[], int]:
    chance = random.Random(seed)  # noqa: S311 - a simulation
    return lambda: min(LONGEST, max(1, round(chance.lognormvariate(math.log(median), sigma))))


@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 100, 1_000, 65_535, 10**6, 10**9])
def test_a_bucket_stands_for_its_lengths(tokens: int) -> None:
    assert middle_of(bucket_of(tokens)) == pytest.approx(tokens, rel=0.016)
    assert bucket_of(tokens) <= bucket_of(tokens + 1) <= bucket_of(tokens) + 1


def test_a_sketch_knows_mean_and_variance_up_to_a_maximum() -> None:
    draw = lognormal(1, 300, 0.8)
    answers = [draw() for _ in range(5000)]
    for cap in (LONGEST, 400):
        cut = [min(one, cap) for one in answers]
        mean = sum(cut) / len(cut)
        variance = sum((one - mean) ** 2 for one in cut) / (len(cut) - 1)
        moments = sketch_of(answers).moments(cap)
        assert (moments.mean, moments.variance) == pytest.approx((mean, variance), rel=0.01)


class Population:
    """Answers of one distribution, to draw from by the thousand."""

    def __init__(self, seed: int, sigma: float) -> None:
        draw = lognormal(seed, 150, sigma)
        self._answers = [draw() for _ in range(100_000)]
        self._buckets = [bucket_of(answer) for answer in self._answers]
        self._chance = random.Random(seed)  # noqa: S311 - a simulation

    def cost(self, rows: int) -> int:
        return PRICE * sum(self._chance.choices(self._answers, k=rows))

    def sketch(self, calls: int) -> Sketch:
        counts = Counter(self._chance.choices(self._buckets, k=calls))
        return Sketch(calls, 0, 0, 1, tuple(counts[bucket] for bucket in range(max(counts) + 1)))


@pytest.mark.parametrize(
    ("rows", "history", "sigma"), [(500, 100, 0.6), (500, 2000, 0.8), (1000, 1000, 0.7), (20, 2000, 0.6)]
)
async def test_nine_batches_in_ten_cost_less_than_p90_and_the_middle_is_close(
    rows: int, history: int, sigma: float
) -> None:
    """Many batches, each quoted by a history of its own: both are drawn from one lognormal distribution."""
    population = Population(rows * history, sigma)
    quoted = Quoter(snapshot())
    for number in range(rows):
        quoted.add(request(LONG, number))
    closest = SketchKey(TARGET.provider, TARGET.model, fingerprints(CHAT, request(LONG).document)[0])
    below = halves = close = 0
    batches = 1500
    for _ in range(batches):
        found = await quoted.quote(knowing({closest: population.sketch(history)}))
        cost = population.cost(rows)
        below += cost <= found.p90
        halves += cost <= found.p50
        close += abs(found.expected - cost) <= 0.1 * cost
        assert found.known_by_template == rows
    assert 0.88 <= below / batches <= 0.92
    assert 0.46 <= halves / batches <= 0.54
    if rows >= 500 and history >= rows:
        assert close / batches > 0.9


async def test_who_is_not_known_by_template_is_known_by_what_is_around_it(tmp_path: Path) -> None:
    mine, other = request(), request("Translate the following: {}")
    strict = request(response_format={"type": "json_object"})
    closest, wide, model = keys_of(mine)
    known = {closest: sketch_of([100] * 50), wide: sketch_of([200] * 50), model: sketch_of([300] * 50)}
    for asked, tokens, counts in [
        (mine, 100, (1, 0)),
        (other, 200, (1, 0)),
        (strict, 300, (0, 1)),
    ]:
        found = await quote([asked], known)
        assert found.expected_output_tokens == pytest.approx(tokens, rel=0.016)
        assert (found.known_by_template, found.known_by_model, found.unknown) == (*counts, 0)
    few = {model: sketch_of([300] * (KNOWN_CALLS - 1))}
    found = await quote([mine], few)
    assert (found.unknown, found.expected) == (1, found.most)


async def test_requests_of_a_template_that_is_not_known_are_not_averaged_out() -> None:
    draw = lognormal(7, 150, 0.8)
    batch = [request(number=number) for number in range(500)]
    closest, wide, _ = keys_of(batch[0])
    sketch = sketch_of([draw() for _ in range(2000)])
    sure, unsure = await quote(batch, {closest: sketch}), await quote(batch, {wide: sketch})
    assert sure.expected == unsure.expected
    assert sure.p90 < 1.1 * sure.expected
    assert unsure.p90 > 1.5 * unsure.expected


async def test_prompts_cost_what_prompts_of_their_template_did() -> None:
    document = {"prices": {"openai/cheap": {"input": "1", "cached_input": "0.5", "output": "0"}}}
    configuration = Configuration.from_document(document)
    quoter = Quoter(Snapshot(0, configuration, PriceBook(configuration)))
    one = request("Sum up the following: " + "word " * 200)
    quoter.add(one)
    collected = Collected()
    for _ in range(KNOWN_CALLS):
        collected.add(Usage(250, 100, 10, 0), 1000)
    found = await quoter.quote(knowing({keys_of(one)[0]: collected.sketch()}))
    tokens = math.ceil(one.checked.size / 4)
    assert found.expected_input_tokens == pytest.approx(tokens, abs=1)
    assert found.p50 == pytest.approx(tokens * 1000 * (0.6 + 0.4 * 0.5), rel=0.01)


@pytest.mark.parametrize(
    ("changed", "shared"),
    [
        ({"seed": 3, "user": "u", "metadata": {"a": "b"}}, 4),
        ({"messages": [{"role": "user", "content": "Sum up the following: something else"}]}, 3),
        ({"messages": [{"role": "user", "content": "Now do another thing"}]}, 1),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": PARTED}]}]}, 3),
        ({"messages": [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}]}, 0),
        ({"temperature": 0}, 0),
        ({"max_tokens": 5}, 0),
    ],
)
def test_what_makes_a_template_is_what_its_requests_have_in_common(changed: JsonObject, shared: int) -> None:
    one = request()
    mine, theirs = fingerprints(CHAT, one.document), fingerprints(CHAT, one.document | changed)
    assert len(set(mine) & set(theirs)) == shared
    assert len(mine) == 4
    assert "Sum" not in "".join(mine)


async def test_what_is_learnt_adds_up_and_fades(pool: Pool) -> None:
    key, other = SketchKey("openai", "m", "t"), SketchKey("openai", "m")
    await lengths.learn(pool, {key: sketch_of([5, 1000])})
    await lengths.learn(pool, {key: sketch_of([5, 7]), other: sketch_of([1])})
    found = await lengths.learnt(pool, [key, other, SketchKey("openai", "x")])
    assert found == {key: sketch_of([5, 1000, 5, 7]), other: sketch_of([1])}
    await lengths.learn(pool, {key: sketch_of([1000] * 10_000)})
    await lengths.learn(pool, {key: sketch_of([3])})
    faded = (await lengths.learnt(pool, [key]))[key]
    assert faded.calls == sum(faded.lengths) == (10_004 / 2) + 1
    assert (faded.lengths[3], faded.lengths[5]) == (1, 1)
    await lengths.forget_lengths(pool, unseen_for=timedelta(days=1))
    assert len(await lengths.learnt(pool, [key, other])) == 2
    await pool.execute("UPDATE headrace.output_lengths SET seen_at = seen_at - interval '2 days'")
    await lengths.forget_lengths(pool, unseen_for=timedelta(days=1))
    assert await lengths.learnt(pool, [key, other]) == {}


async def test_a_prompt_of_its_own_is_no_template(pool: Pool) -> None:
    notes, same, own = Lengths(pool), request(), request("Nobody else asks this: {}")
    for _ in range(ENOUGH - 1):
        notes.note(TARGET, CHAT, write_json(same.document), Usage(10, 0, 20, 0))
    notes.note(TARGET, CHAT, write_json(own.document), Usage(10, 0, 20, 0))
    await notes.write()
    mine, theirs = (set(fingerprints(CHAT, one.document)) for one in (same, own))
    keys = [SketchKey(TARGET.provider, TARGET.model, template) for template in (*mine, *theirs, "")]
    assert {key.template for key in await lengths.learnt(pool, keys)} == {*(mine & theirs), ""}
    notes.note(TARGET, CHAT, write_json(same.document), Usage(10, 0, 20, 0))
    await notes.write()
    found = await lengths.learnt(pool, keys)
    assert {key.template: one.calls for key, one in found.items()} == dict.fromkeys(mine, ENOUGH) | {
        "": ENOUGH + 1
    }


async def test_a_busy_worker_notes_what_it_has_time_for(pool: Pool) -> None:
    now = 0.0
    notes, long = Lengths(pool, clock=lambda: now), request("word " * 20_000)
    for second in range(100):
        now = float(second)
        for _ in range(100):
            notes.note(TARGET, CHAT, write_json(long.document), Usage(10, 0, 20, 0))
    await notes.write()
    found = await lengths.learnt(pool, [SketchKey(TARGET.provider, TARGET.model)])
    (sketch,) = found.values()
    assert 0.9 < sketch.body_bytes / (100 * lengths_module.BYTES_PER_SECOND) < 1.1


@pytest.mark.usefixtures("environment")
async def test_a_batch_is_quoted_by_the_answers_that_workers_had(
    pool: Pool, dispatch: Dispatch, provider: SimulatedProvider, command: Command
) -> None:
    """The provider's answers have a distribution of its own; a second batch would cost what the first did."""
    jobs = Jobs(pool, dispatch)
    bodies = [{"messages": [{"role": "user", "content": f"Sum up the following: {n}"}]} for n in range(120)]
    async with running_worker(concurrency=50):
        ids = [(await jobs.add(body=body))[0] for body in bodies]
        first = await jobs.ended(ids)
    lines = [
        {"custom_id": f"row-{n}", "method": "POST", "url": str(CHAT), "body": {"model": "gpt-4o-mini"} | body}
        for n, body in enumerate(bodies)
    ]
    path = command.folder / "requests.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = await command("submit", path, "--dry-run", "--json")
    told = done.answer["quote"]
    assert isinstance(told, dict)
    quoted = cast("dict[str, int]", told)
    assert (quoted["known_by_template"], quoted["known_by_model"], quoted["unknown"]) == (120, 0, 0)
    assert quoted["p50_nano_usd"] == pytest.approx(sum(one.bill.cost for one in first), rel=0.1)
    assert quoted["p50_nano_usd"] < quoted["p90_nano_usd"] < quoted["most_nano_usd"]
    assert "their template 120" in (await command("submit", path, "--dry-run")).out
