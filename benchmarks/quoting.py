"""How long a file is quoted for: every line checked, and looked up in what was learnt of its templates."""

import json
import random
import time
from collections.abc import Collection
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from figures import Figure, progress
from stage import open_stage

from headrace_producer.batch.lines import OpenAILines
from headrace_producer.batch.submit import Submission, quote_file
from headrace_producer.in_force import read_snapshot
from headrace_shared.ids import Tenant
from headrace_shared.sketches import Collected, Sketch, SketchKey
from headrace_shared.store import lengths
from headrace_shared.store.pool import Pool, open_pool
from headrace_shared.usage import Usage

_NAME = "quote"
_ROWS = 50_000
_TEMPLATES = 20
_ROUNDS = 3
_WORDS = ("the", "water", "arrives", "as", "fast", "as", "it", "likes", "and", "the", "wheel", "can")


async def measure(_jobs: int) -> list[Figure]:
    figures: list[Figure] = []
    with TemporaryDirectory(prefix="headrace-quote-") as directory:
        async with open_stage() as stage:
            pool = await open_pool(stage.postgres_url)
            for name, own in (("of 20 templates", False), ("each a prompt of its own", True)):
                path = Path(directory) / "requests.jsonl"
                _write(path, own=own)
                await _learn(pool, path)
                rounds = [await _quote(pool, path) for _ in range(_ROUNDS)]
                seconds, processor = (median(one[place] for one in rounds) for place in (0, 1))
                progress(f"quote of {_ROWS:,} rows, {name}: {seconds:.2f} s, {processor:.2f} s of processor")
                figures += [
                    Figure(_NAME, f"{_ROWS:,} rows, {name}", seconds, "s", at_most=5),
                    Figure(_NAME, "its processor time", processor, "s"),
                ]
            await pool.close()
    return figures


def _write(path: Path, *, own: bool) -> None:
    chance = random.Random(1)  # noqa: S311
    with path.open("w") as file:
        for number in range(_ROWS):
            text = " ".join(chance.choices(_WORDS, k=chance.randrange(20, 200)))
            opening = f"{number:x} " if own else f"Template number {number % _TEMPLATES}: sum up. "
            messages = [
                {"role": "system", "content": "You are brief."},
                {"role": "user", "content": opening + text},
            ]
            body = {"model": "gpt-4o-mini", "messages": messages, "max_tokens": 800}
            line = {
                "custom_id": f"r{number}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": body,
            }
            file.write(json.dumps(line) + "\n")


async def _learn(pool: Pool, path: Path) -> None:
    """Know every template that enough of the file's requests have."""
    chance, collected = random.Random(2), Collected()  # noqa: S311
    for _ in range(2000):
        collected.add(Usage(300, 0, min(800, round(chance.lognormvariate(5, 0.8))), 0), 1000)

    async def learn(keys: Collection[SketchKey]) -> dict[SketchKey, Sketch]:
        await lengths.learn(pool, dict.fromkeys(keys, collected.sketch()))
        return {}

    await quote_file(_submission(path), await read_snapshot(pool), learn)


async def _quote(pool: Pool, path: Path) -> tuple[float, float]:
    began, worked = time.perf_counter(), time.process_time()

    async def seen(keys: Collection[SketchKey]) -> dict[SketchKey, Sketch]:
        return await lengths.learnt(pool, keys)

    quote = await quote_file(_submission(path), await read_snapshot(pool), seen)
    seconds, processor = time.perf_counter() - began, time.process_time() - worked
    if quote.unknown or quote.requests != _ROWS:
        raise RuntimeError(f"not everything was known: {quote}")
    return seconds, processor


def _submission(path: Path) -> Submission:
    return Submission(path, OpenAILines(), Tenant("default"))
