"""The work of the demo: prompts such as a small business has, each another one."""

from collections.abc import Mapping
from dataclasses import dataclass

TENANTS = ("acme", "globex")
LANES = ("interactive", "default", "batch")
MODELS = ("gpt-4o-mini", "gpt-4.1-nano", "gpt-4.1-mini")

CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"

_PRODUCTS = (
    "a hand-cranked coffee grinder", "a folding bicycle", "a wool blanket", "a cast-iron pan",
    "a pair of hiking boots", "a desk lamp with a dimmer", "a rain jacket for children",
    "a set of oil paints", "a cordless drill", "a two-person tent", "a cello bow",
)  # fmt: skip
_TROUBLES = (
    "It arrived a week late and the box was torn.",
    "The colour is nothing like the picture.",
    "It worked for two days and then stopped.",
    "I was charged twice and nobody answers the phone.",
    "The instructions are in a language I cannot read.",
    "One of the parts was missing, and the replacement did not fit either.",
    "I love it, but the handle is loose.",
)
_CUSTOMERS = ("Ms Okafor", "Mr Lindqvist", "Dr Tanaka", "Mrs Duarte", "Mr Haddad")
_LANGUAGES = ("Spanish", "Finnish", "Swahili", "Portuguese", "Korean", "Polish")
_TONES = ("friendly", "formal", "brief", "apologetic")
_CITIES = ("Lisbon", "Nairobi", "Tampere", "Osaka", "Montevideo", "Gdansk", "Leeds")
_FIGURES = ("orders", "returns", "newsletter sign-ups", "late deliveries")


@dataclass(frozen=True, slots=True)
class Task:
    """One request, and for whom it is."""

    endpoint: str
    body: Mapping[str, object]
    tenant: str
    lane: str
    kind: str
    prompt: str
    """What is asked, as the body has it."""


def tasks(count: int) -> list[Task]:
    """Return so many tasks of all kinds, lanes, models and tenants, the same each time."""
    return [_task(number) for number in range(count)]


def _task(number: int) -> Task:
    kind, endpoint, prompt, tokens = _prompt(number)
    model = MODELS[number % len(MODELS)]
    if endpoint == RESPONSES:
        body: dict[str, object] = {"model": model, "input": prompt, "max_output_tokens": tokens}
    else:
        system = {"role": "system", "content": f"You work for a shop in {_pick(_CITIES, number)}."}
        messages = [system, {"role": "user", "content": prompt}]
        body = {"model": model, "messages": messages, "max_tokens": tokens}
    tenant = TENANTS[number % 5 // 3]
    return Task(endpoint, body, tenant, LANES[number // 7 % len(LANES)], kind, prompt)


def _prompt(number: int) -> tuple[str, str, str, int]:
    product, customer = _pick(_PRODUCTS, number), _pick(_CUSTOMERS, number)
    tone, language = _pick(_TONES, number // 3), _pick(_LANGUAGES, number)
    lines = (_pick(_TROUBLES, number // 2 + line) for line in range(1 + number % 5))
    letter = f"Order {20_000 + 7 * number}. {' '.join(lines)}"
    kinds = (
        ("reply", CHAT, f"Write a {tone} reply to {customer}, who bought {product}: {letter!r}", 120),
        ("classify", CHAT, f"Is this review good, bad or mixed? One word. {letter}", 4),
        ("translate", RESPONSES, f"Translate into {language}: {letter}", 90),
        (
            "describe",
            CHAT,
            f"Describe {product} (item {number}) in {20 + number % 60} words, in a {tone} tone.",
            140,
        ),
        ("extract", CHAT, f"Name the complaints in this letter as JSON: {letter}", 80),
        ("summarise", RESPONSES, f"Summarise in one sentence what {customer} says: {letter}", 40),
        (
            "report",
            CHAT,
            f"Explain these {_pick(_FIGURES, number)} for item {number}, by month: {_table(number)}",
            100,
        ),
    )
    return kinds[number % len(kinds)]


def _table(number: int) -> str:
    rows = 4 + number % 9
    return "; ".join(f"month {row + 1}: {(number * 37 + row * row * 11) % 400}" for row in range(rows))


def _pick(table: tuple[str, ...], number: int) -> str:
    return table[number % len(table)]
