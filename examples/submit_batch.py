"""What `headrace submit` does, in a program of your own: a JSONL file in, its answers out, in order.

    python examples/submit_batch.py requests.jsonl results.jsonl

Run it again after any interruption: its idempotency keys, the file's digest and the line,
enqueue nothing twice. Answers that are there are only read.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TypedDict

from headrace_producer import Headrace, JobHandle, JobRequest, errors, run


class Line(TypedDict):
    custom_id: str
    url: str
    body: dict[str, object]


def read(path: Path) -> Iterator[Line]:
    with path.open(encoding="utf-8") as file:
        yield from (json.loads(line) for line in file)


def requests_of(path: Path) -> Iterator[JobRequest]:
    key = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    for number, line in enumerate(read(path), start=1):
        yield JobRequest(line["url"], line["body"], lane="batch", idempotency_key=f"{key}:{number}")


async def submit(headrace: Headrace, requests: Iterator[JobRequest]) -> list[JobHandle]:
    handles: list[JobHandle] = []
    while chunk := list(islice(requests, 1000)):
        handles += await headrace.enqueue_many(chunk)
        print(f"{len(handles):,} enqueued", file=sys.stderr)
    return handles


async def main(source: Path, target: Path) -> None:
    async with Headrace() as headrace:
        handles = await submit(headrace, requests_of(source))
        with target.open("w", encoding="utf-8") as output:
            for line, handle in zip(read(source), handles, strict=True):
                try:
                    answer: dict[str, object] = {"body": (await handle.result()).body}
                except errors.JobFailed as failure:
                    answer = {"error": failure.message}
                output.write(json.dumps({"custom_id": line["custom_id"]} | answer) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 3:  # noqa: PLR2004
        sys.exit("usage: submit_batch.py REQUESTS.jsonl RESULTS.jsonl")
    run(main(Path(sys.argv[1]), Path(sys.argv[2])))
