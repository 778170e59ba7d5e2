"""How close the bound of a prompt comes to its tokens: `make bench ARGS="--only bounds"`."""

import time
from pathlib import Path

from figures import Figure

from headrace_shared.jsonvalue import write_json
from headrace_shared.request import Endpoint, prepare
from headrace_shared.vocabularies import Vocabulary, tokenizer_of

_NAME = "bounds"
_ROOT = Path(__file__).parent.parent
_KINDS = {
    "English": _ROOT / "ARCHITECTURE.md",
    "Python": _ROOT / "shared" / "headrace_shared" / "request.py",
}
_PROMPT = 4_000
"""Characters of a prompt: some pages of text."""
_ROUNDS = 200


async def measure(_jobs: int) -> list[Figure]:
    vocabulary = Vocabulary.O200K
    tokenizer = tokenizer_of(vocabulary)
    if tokenizer is None:
        raise SystemExit("the extra `tokens` is not installed")
    figures: list[Figure] = []
    for kind, source in _KINDS.items():
        text = source.read_text(encoding="utf-8")[:_PROMPT]
        body = write_json({"model": "m", "messages": [{"role": "user", "content": text}]})
        used = tokenizer.count(text) + 7
        by_bytes, spent = _bounded(body, None)
        by_tokens, more = _bounded(body, vocabulary)
        figures += [
            Figure(_NAME, f"{kind}: bound / tokens of the prompt, by bytes", by_bytes / used, "x"),
            Figure(_NAME, f"{kind}: the same with the vocabulary", by_tokens / used, "x"),
            Figure(_NAME, f"{kind}: CPU for it", (more - spent) / len(body) * 1e9, "ns/byte"),
        ]
    return figures


def _bounded(body: bytes, vocabulary: Vocabulary | None) -> tuple[int, float]:
    """Return a bound, and the seconds of processor time that making the request ready took."""
    ready = prepare(body, Endpoint.CHAT_COMPLETIONS, "m", 1024, vocabulary)
    began = time.process_time()
    for _ in range(_ROUNDS):
        prepare(body, Endpoint.CHAT_COMPLETIONS, "m", 1024, vocabulary)
    return ready.input_bound, (time.process_time() - began) / _ROUNDS
