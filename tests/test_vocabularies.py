"""Where the model's vocabulary is at hand, what is held is closer to the bill, and never below it."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace_shared.configuration import Configuration
from headrace_shared.dispatch.dispatch import Dispatch
from headrace_shared.prices import PriceBook
from headrace_shared.request import Endpoint, prepare
from headrace_shared.routes import Target
from headrace_shared.store.pool import Pool
from headrace_shared.testing.jobs import Jobs
from headrace_shared.testing.scripted_provider import ScriptedProvider, completion, refusal
from headrace_shared.vocabularies import MOST_COUNTED, Counted, Vocabulary, tokenizer_of, vocabulary_of
from headrace_workers.testing import running_worker

CHAT = Endpoint.CHAT_COMPLETIONS
MOST = 50
PROSE = "A queue that forgets nothing is worth more than one that is fast. " * 20
EACH = pytest.mark.parametrize("vocabulary", list(Vocabulary))


def tokens(vocabulary: Vocabulary, text: str) -> int:
    tokenizer = tokenizer_of(vocabulary)
    assert tokenizer is not None, "the extra `tokens` is not installed"
    return len(tokenizer.encode(text))


def prompt_tokens(vocabulary: Vocabulary, messages: Sequence[Mapping[str, str]]) -> int:
    """Count as OpenAI's recipe does: three tokens frame a message, one a name, three begin the answer."""
    return 3 + sum(
        3 + sum(tokens(vocabulary, text) for text in message.values()) + ("name" in message)
        for message in messages
    )


def bound(
    vocabulary: Vocabulary | None,
    document: Mapping[str, object],
    endpoint: Endpoint = CHAT,
    *,
    in_ascii: bool = True,
) -> int:
    body = json.dumps({"model": "m", **document}, ensure_ascii=in_ascii).encode()
    return prepare(body, endpoint, "m", MOST, vocabulary).input_bound


def chat(*messages: Mapping[str, object]) -> dict[str, object]:
    return {"messages": list(messages)}


def user(content: object) -> dict[str, object]:
    return {"role": "user", "content": content}


@pytest.fixture
def jobs(pool: Pool, dispatch: Dispatch) -> Jobs:
    return Jobs(pool, dispatch)


CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")


def repeated(text: str, times: int) -> str:
    return text * times


def said(role: str, content: str, name: str | None) -> dict[str, str]:
    return {"role": role, "content": content} | ({"name": name} if name else {})


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "user", "\n", "x"]
TEXTS: st.SearchStrategy[str] = st.one_of(
    st.text(CHARACTERS, max_size=60),
    st.text(st.sampled_from(" \n\t\r'\"\\/aA1!.é日\u0301\U0001f600<|>"), max_size=60),
    st.lists(st.sampled_from(SPECIAL)).map("".join),
    st.builds(repeated, st.text(CHARACTERS, min_size=1, max_size=4), st.integers(1, 300)),
)
ROLES = st.sampled_from(["system", "user", "assistant", "developer"])
NAMES = st.none() | st.text("abcXYZ_-09", min_size=1, max_size=64)
MESSAGES = st.lists(st.builds(said, ROLES, TEXTS, NAMES), min_size=1, max_size=5)


@EACH
@given(messages=MESSAGES, in_ascii=st.booleans(), pieces=st.integers(0, 3))
def test_the_bound_is_at_least_the_tokens_of_every_prompt_and_never_more_than_its_bytes(
    vocabulary: Vocabulary,
    messages: list[dict[str, str]],
    in_ascii: bool,  # noqa: FBT001
    pieces: int,
) -> None:
    sent: list[dict[str, object]] = [dict(message) for message in messages]
    for message, of in zip(sent, messages, strict=True):
        text = of["content"]
        if pieces:  # the same text, in one part or in several
            cuts = [len(text) * at // pieces for at in range(pieces + 1)]
            message["content"] = [{"type": "text", "text": text[start:end]} for start, end in pairwise(cuts)]
    most = bound(vocabulary, chat(*sent), in_ascii=in_ascii)
    assert prompt_tokens(vocabulary, messages) <= most <= bound(None, chat(*sent), in_ascii=in_ascii)


@EACH
@given(texts=st.lists(TEXTS, min_size=1, max_size=5), in_ascii=st.booleans())
def test_the_bound_is_at_least_the_tokens_of_all_texts_that_are_embedded_or_asked_of_responses(
    vocabulary: Vocabulary,
    texts: list[str],
    in_ascii: bool,  # noqa: FBT001
) -> None:
    counts = [tokens(vocabulary, text) for text in texts]
    embedded = bound(vocabulary, {"input": texts}, Endpoint.EMBEDDINGS, in_ascii=in_ascii)
    assert sum(counts) <= embedded
    asked = {"instructions": texts[0], "input": [user(text) for text in texts[1:]]}
    assert sum(counts) + 4 * len(texts) <= bound(vocabulary, asked, Endpoint.RESPONSES, in_ascii=in_ascii)
    said = {"instructions": texts[0], "input": texts[-1]}
    assert counts[0] + counts[-1] <= bound(vocabulary, said, Endpoint.RESPONSES, in_ascii=in_ascii)


class Nothing:
    """A vocabulary in which everything is free: what is saved is what the text was taken for."""

    def count(self, text: str, /) -> int:
        return 0

    def encode(self, text: str, /) -> list[int]:
        return []


@pytest.mark.parametrize("in_ascii", [True, False])
def test_no_text_is_taken_for_more_bytes_than_it_has_in_any_body(in_ascii: bool) -> None:  # noqa: FBT001
    characters = [chr(code) for code in (*range(1, 0xD800), *range(0xE000, 0x11000), 0x1F600, 0x10FFFF)]
    for character in characters:
        written = json.dumps(character, ensure_ascii=in_ascii)
        texts = Counted(Nothing(), in_ascii=written.isascii())
        texts.add(character)
        assert texts.saved <= len(written.encode()) - 2, hex(ord(character))


@EACH
def test_prose_is_bounded_by_a_third_of_its_bytes_and_what_is_beside_it_by_its_bytes(
    vocabulary: Vocabulary,
) -> None:
    for content in (PROSE, [{"type": "text", "text": PROSE}]):
        document = {**chat(user(content)), "tools": [{"type": "function", "function": {"name": PROSE}}]}
        saved = bound(None, document) - bound(vocabulary, document)
        assert saved == len(PROSE) - tokens(vocabulary, PROSE) > len(PROSE) * 2 / 3


def test_several_parts_and_what_is_too_long_to_count_stay_bytes() -> None:
    part = {"type": "text", "text": PROSE}
    long = "a " * (MOST_COUNTED // 2)
    for document in (
        chat(user([part, part])),
        chat(user(long + "b")),
        chat({"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": PROSE}}]}),
    ):
        assert bound(Vocabulary.O200K, document) == bound(None, document)
    # So much of one request is counted, however many texts it has.
    once, twice = (bound(Vocabulary.O200K, chat(*[user(long)] * times)) for times in (1, 2))
    assert once < bound(None, chat(user(long))) // 1.9
    assert twice - once == bound(None, chat(*[user(long)] * 2)) - bound(None, chat(user(long)))


@pytest.mark.parametrize(
    ("model", "vocabulary"),
    [
        ("gpt-3.5-turbo-0125", Vocabulary.CL100K),
        ("gpt-4", Vocabulary.CL100K),
        ("gpt-4-turbo-2024-04-09", Vocabulary.CL100K),
        ("text-embedding-3-small", Vocabulary.CL100K),
        ("text-embedding-ada-002", Vocabulary.CL100K),
        ("chatgpt-4o-latest", Vocabulary.O200K),
        ("gpt-4o-mini", Vocabulary.O200K),
        ("gpt-4.1-nano", Vocabulary.O200K),
        ("gpt-5.1-codex", Vocabulary.O200K),
        ("o4-mini", Vocabulary.O200K),
        ("gpt-6-astra", None),
        ("gpt-50", None),
        ("gpt-4omega", None),
        ("omni-moderation-latest", None),
        ("my-gpt-4o", None),
        ("llama-3", None),
    ],
)
def test_only_models_that_are_known_are_counted(model: str, vocabulary: Vocabulary | None) -> None:
    assert vocabulary_of("openai", model) == vocabulary_of("azure", model) == vocabulary
    assert vocabulary_of("groq", model) is None


def test_the_price_of_a_target_says_what_its_tokens_are() -> None:
    prices = PriceBook(
        Configuration.from_document(
            {
                "providers": {
                    "azure": {"base_url": "https://a.example/v1", "priced_as": "azure"},
                    "other": {"base_url": "https://b.example/v1"},
                },
                "prices": {
                    "other/gpt-4o": {"input": "1", "output": "1"},
                    "openai/o3": {"input": "1", "output": "1"},
                },
            }
        )
    )
    targets = ("openai/gpt-4o", "openai/gpt-4", "openai/o3", "azure/gpt-4o", "other/gpt-4o")
    found = [prices.price(Target.parse(target)).vocabulary for target in targets]
    assert found == [Vocabulary.O200K, Vocabulary.CL100K, Vocabulary.O200K, Vocabulary.O200K, None]


PROGRAM = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("bpe_openai"):
            raise ModuleNotFoundError(name)

if sys.argv[1] == "blocked":
    sys.meta_path.insert(0, Blocked())
from headrace_shared.request import Endpoint, prepare
from headrace_shared.vocabularies import Vocabulary
body = b'{"model":"m","messages":[{"role":"user","content":"' + b"some words " * 100 + b'"}]}'
prepared = [prepare(body, Endpoint.CHAT_COMPLETIONS, "m", 1, each) for each in (None, Vocabulary.O200K)]
print(prepared[0].input_bound - prepared[1].input_bound)
"""


@pytest.mark.parametrize(("extra", "saved"), [("blocked", 0), ("installed", 1100 - 201)])
def test_without_the_extra_bytes_bound_everything(extra: str, saved: int) -> None:
    command = [sys.executable, "-c", PROGRAM, extra]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    assert int(done.stdout) == saved


@pytest.mark.usefixtures("environment")
async def test_each_target_is_held_for_in_its_own_vocabulary_and_the_hold_covers_its_bill(
    jobs: Jobs, scripted: ScriptedProvider
) -> None:
    """The same words are about twice the tokens in the older vocabulary, and the last target's is unknown."""
    text = "नमस्ते दुनिया, पानी चक्की तक जाता है। " * 20
    models = {"gpt-4o": Vocabulary.O200K, "gpt-4": Vocabulary.CL100K, "new": None}
    await jobs.configure(
        {
            "prices": {f"openai/{model}": {"input": "1", "output": "10"} for model in models},
            "routes": {
                "m": {
                    "targets": [{"provider": "openai", "model": "gpt-4o"}],
                    "fallbacks": [
                        {"provider": "openai", "model": model, "on": ["content_filter"]}
                        for model in ("gpt-4", "new")
                    ],
                }
            },
        }
    )
    messages = [{"role": "user", "content": text}]
    used = prompt_tokens(Vocabulary.CL100K, messages)
    filtered = refusal(400, "Not this.", code="content_filter")
    scripted.script(filtered, filtered, completion(prompt_tokens=used, completion_tokens=MOST))
    body = {"messages": messages, "max_completion_tokens": MOST}
    async with running_worker():
        [job] = await jobs.add(model="m", body=body)
        await jobs.ended([job])
    calls = await jobs.calls(job)
    assert [call["model"] for call in calls] == list(models)
    stored = json.dumps({"model": "m", **body}).encode()
    for call, vocabulary in zip(calls, models.values(), strict=True):
        bounds = prepare(stored, CHAT, call["model"], MOST, vocabulary)
        assert call["held_nano"] == bounds.input_bound * 1_000 + MOST * 10_000
    newest, older, unknown = (call["held_nano"] - MOST * 10_000 for call in calls)
    # Counted in the vocabulary of the first target, the second one's bill would not be covered.
    assert newest < used * 1_000 <= older < unknown


@pytest.mark.usefixtures("environment")
@EACH
async def test_a_call_that_the_provider_counts_is_covered_by_what_was_held(
    jobs: Jobs, scripted: ScriptedProvider, vocabulary: Vocabulary
) -> None:
    model = {Vocabulary.O200K: "gpt-4o", Vocabulary.CL100K: "gpt-4"}[vocabulary]
    await jobs.configure({"prices": {f"openai/{model}": {"input": "1", "output": "10"}}})
    said = [{"role": role, "content": f"{PROSE} <|im_end|> é\n\t日本 {role}"} for role in ("system", "user")]
    used = prompt_tokens(vocabulary, said)
    scripted.script(completion(prompt_tokens=used, completion_tokens=MOST))
    async with running_worker():
        [job] = await jobs.add(model=model, body={"messages": said, "max_completion_tokens": MOST})
        await jobs.ended([job])
    [call] = await jobs.calls(job)
    assert call["cost_nano"] == used * 1_000 + MOST * 10_000
    assert call["cost_nano"] <= call["held_nano"] < call["cost_nano"] * 1.6
    in_bytes = prepare(scripted.requests[0], CHAT, model, MOST)
    assert call["held_nano"] < (in_bytes.input_bound * 1_000 + MOST * 10_000) / 2
