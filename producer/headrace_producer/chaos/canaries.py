"""Words that must never be seen in certain places, and the search for them there."""

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from headrace_producer.chaos import redis_keys
from headrace_shared.dispatch.connection import Redis

KEY_MARK = "idem."
"""How every idempotency key of a run begins."""


@dataclass(frozen=True, slots=True)
class Canaries:
    """The secrets of one run, and a word of all its prompts."""

    api_key: str
    master: str
    word: str

    @classmethod
    def new(cls) -> Self:
        return cls(
            f"sk-canary{secrets.token_hex(12)}",
            f"canary{secrets.token_hex(16)}",
            f"canary{secrets.token_hex(6)}",
        )

    @property
    def of_stores(self) -> Mapping[str, str]:
        """What may be neither in a log nor in Redis nor in a span: the word, and what it is."""
        return {
            self.api_key: "the provider's key",
            self.master: "the webhooks' secret",
            self.word: "a prompt",
            KEY_MARK: "an idempotency key",
        }

    def in_text(self, text: bytes) -> list[str]:
        """Name what of it is in a text."""
        return [what for word, what in self.of_stores.items() if word.encode() in text]

    async def in_redis(self, redis: Redis) -> list[str]:
        """Name the keys in Redis that hold any of it."""
        return await redis_keys.find(redis, list(self.of_stores))

    def in_files(self, files: Iterable[Path]) -> tuple[int, list[str]]:
        """Return how many files were searched, and what was found in which."""
        found: list[str] = []
        count = 0
        for path in files:
            count += 1
            found += [f"{what} is in {path.name}" for what in self.in_text(path.read_bytes())]
        return count, found
