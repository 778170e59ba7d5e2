"""What producers ask for: it follows from the seed and a job's key, so that an auditor knows it too."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from random import Random

from headrace_producer import JobRequest
from headrace_shared.testing.calls import prompt_hash

MODELS = ("gpt-4o-mini", "gpt-4.1-nano")
MAX_TOKENS = 60
BATCH = 12
"""Jobs that are asked for in one transaction."""

_ROLES = ("free", "second", "waits", "rejected")
TENANTS = len(_ROLES)

_LANES = ("interactive", "default", "batch")
_WORDS = ("grain", "flour", "sluice", "wheel", "stone", "river", "weir", "pond")


@dataclass(frozen=True, slots=True)
class Tenants:
    """Who asks; the names are of one run alone."""

    run: str
    """The common beginning of their names."""
    free: str
    """Has a limit that it never reaches."""
    second: str
    """Has no limit."""
    waits: str
    """Runs out of its budget and waits for more, which it gets."""
    rejected: str
    """Runs out of its budget, and is refused from then on."""

    @classmethod
    def of(cls, run: str) -> "Tenants":
        return cls(run, *(f"{run}-{name}" for name in _ROLES))

    @property
    def all(self) -> tuple[str, ...]:
        return self.free, self.second, self.waits, self.rejected


@dataclass(frozen=True, slots=True)
class Wish:
    """One job as its key has it."""

    key: str
    tenant: str
    endpoint: str
    model: str
    prompt: str
    lane: str
    has_webhook: bool
    delay: timedelta | None
    callers: int
    """Who ask for it at the same time."""
    cancel_after: float | None
    """Seconds after the ack."""

    @property
    def prompt_hash(self) -> str:
        """Under which the simulated provider books its calls."""
        return prompt_hash(self.prompt)

    def request(self, hooks: Mapping[str, str]) -> JobRequest:
        """Return what is handed to the client."""
        if self.endpoint == "/v1/responses":
            body: dict[str, object] = {"input": self.prompt, "max_output_tokens": MAX_TOKENS}
        else:
            messages = [{"role": "user", "content": self.prompt}]
            body = {"messages": messages, "max_tokens": MAX_TOKENS}
        return JobRequest(
            self.endpoint,
            {"model": self.model, **body},
            tenant=self.tenant,
            lane=self.lane,
            idempotency_key=self.key,
            webhook=hooks[self.tenant] if self.has_webhook else None,
            delay=self.delay,
        )


def keys_of(seed: int, producer: int, number: int) -> tuple[str, ...]:
    """Return the keys of a producer's ask: one, or as many as a batch has.

    Some are the same for all producers, which then ask for one job at the same time.
    """
    kind = Random(f"{seed}:{number}").random()  # noqa: S311
    if kind < 0.02:  # noqa: PLR2004
        return tuple(f"idem.p{producer}.{number}.{line}" for line in range(BATCH))
    if kind < 0.10:  # noqa: PLR2004
        return (f"idem.all.{number}",)
    return (f"idem.p{producer}.{number}",)


def wish_of(seed: int, key: str, tenants: Tenants, canary: str) -> Wish:
    """Return the job of a key; its prompt is nobody else's, and carries the canary."""
    random = Random(f"{seed}:{key}")  # noqa: S311
    tenant = random.choices(tenants.all, weights=(40, 28, 16, 16))[0]
    words = " ".join(random.choices(_WORDS, k=random.randint(3, 30)))
    return Wish(
        key=key,
        tenant=tenant,
        endpoint=random.choice(("/v1/chat/completions", "/v1/chat/completions", "/v1/responses")),
        model=random.choice(MODELS),
        prompt=f"{canary} {key}: {words}",
        lane=random.choice(_LANES),
        has_webhook=random.random() < 0.6,  # noqa: PLR2004
        delay=timedelta(seconds=round(random.uniform(0.5, 6), 2)) if random.random() < 0.12 else None,  # noqa: PLR2004
        callers=3 if random.random() < 0.08 else 1,  # noqa: PLR2004
        cancel_after=random.choice((0.0, random.uniform(0, 3))) if random.random() < 0.12 else None,  # noqa: PLR2004
    )
