from datetime import UTC, datetime
from decimal import Decimal

import genai_prices
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace_shared.configuration import Configuration, parse_toml
from headrace_shared.errors import UnknownPrice
from headrace_shared.money import from_decimal
from headrace_shared.prices import PriceBook
from headrace_shared.routes import Target
from headrace_shared.usage import Usage

NOON = datetime(2026, 11, 1, 12, tzinfo=UTC)
MODELS = [
    "chatgpt-4o-latest",
    "codex-mini",
    "gpt-3.5-turbo",
    "gpt-3.5-turbo-0613",
    "gpt-3.5-turbo-1106",
    "gpt-4",
    "gpt-4-32k",
    "gpt-4-turbo",
    "gpt-4.1",
    "gpt-4.1-mini",
    "gpt-4.1-nano",
    "gpt-4.5-preview",
    "gpt-4o",
    "gpt-4o-2024-05-13",
    "gpt-4o-mini",
    "gpt-4o-mini-2024-07-18",
    "gpt-5",
    "gpt-5-mini",
    "gpt-5-nano",
    "gpt-5-pro",
    "gpt-5.1",
    "gpt-5.2",
    "gpt-5.2-pro",
    "gpt-5.3",
    "gpt-5.3-codex",
    "gpt-5.4",
    "gpt-5.4-mini",
    "gpt-5.4-nano",
    "gpt-5.4-pro",
    "gpt-5.5",
    "gpt-5.5-pro",
    "gpt-5.6-luna",
    "gpt-5.6-sol",
    "gpt-5.6-terra",
    "gpt-6-astra",
    "gpt-6-luna",
    "gpt-6-sol",
    "gpt-6.1-sol",
    "gpt-6.1-terra",
    "o1",
    "o1-mini",
    "o1-pro",
    "o3",
    "o3-mini",
    "o3-pro",
    "o4-mini",
    "ft:gpt-4o-mini-2024-07-18:a::b",
]
USAGES = (
    Usage(0, 0, 0, 0),
    Usage(1, 0, 1, 0),
    Usage(7, 3, 11, 5),
    Usage(1_237, 1_024, 333, 128),
    Usage(200_001, 17, 4_099, 0),
    Usage(272_000, 1, 1, 0),
    Usage(272_001, 100_003, 1_000, 1_000),
    Usage(1_000_003, 5, 77_777, 0),
    Usage(300_007, 11, 9, 0, cache_write_tokens=100_019),
)


def openai(model: str) -> Target:
    return Target("openai", model)


def book(text: str = "") -> PriceBook:
    return PriceBook(parse_toml(text, "headrace.toml"), now=lambda: NOON)


BOOK = book()


@pytest.mark.parametrize("model", MODELS)
def test_a_cost_is_what_the_price_data_computes(model: str) -> None:
    price = BOOK.price(openai(model))
    assert price.version == f"genai-prices {genai_prices.__version__}"
    for usage in USAGES:
        expected = genai_prices.calc_price(
            genai_prices.Usage(
                input_tokens=usage.prompt_tokens,
                cache_read_tokens=usage.cached_tokens,
                cache_write_tokens=usage.cache_write_tokens,
                output_tokens=usage.completion_tokens,
            ),
            model,
            provider_id="openai",
            genai_request_timestamp=NOON,
        )
        assert price.cost(usage) == from_decimal(expected.total_price), usage


def test_a_well_known_price() -> None:
    price = BOOK.price(openai("gpt-4o-mini"))
    assert (price.input, price.cached_input, price.output) == (150_000_000, 75_000_000, 600_000_000)
    assert BOOK.price(openai("gpt-4o-mini")) is price


def test_a_long_prompt_costs_the_next_step() -> None:
    price = BOOK.price(openai("gpt-6-astra"))
    assert price.cost(Usage(272_000, 0, 1_000, 0)) == 2_770_000_000
    assert price.cost(Usage(272_001, 0, 1_000, 0)) == 5_515_020_000


@pytest.mark.parametrize(
    "model",
    [
        "gpt-4o-mini-2099-01-01",
        "openai/gpt-4o",
        "claude-3-5-sonnet-latest",
        "whisper-1",
        "tts-1",
        "gpt-image-1",
        "gpt-4o-search-preview",
        "",
    ],
)
def test_what_nobody_prices_is_refused(model: str) -> None:
    with pytest.raises(UnknownPrice, match="No price is known"):
        BOOK.price(openai(model))


def test_a_provider_is_not_priced_like_one_of_a_similar_name() -> None:
    text = '[providers.openai-proxy]\nbase_url = "http://proxy/v1"\n'
    with pytest.raises(UnknownPrice):
        book(text).price(Target("openai-proxy", "gpt-4o"))
    with pytest.raises(UnknownPrice):
        book(text + 'priced_as = "litellm"').price(Target("openai-proxy", "openai/gpt-4o"))
    priced = book(text + 'priced_as = "openai"').price(Target("openai-proxy", "gpt-4o"))
    assert priced.input == BOOK.price(openai("gpt-4o")).input
    with pytest.raises(UnknownPrice):
        BOOK.price(Target("nowhere", "gpt-4o"))


def test_a_listed_zero_is_not_free_but_moderation_is() -> None:
    text = '[providers.openrouter]\nbase_url = "http://router/v1"'
    with pytest.raises(UnknownPrice):
        book(text).price(Target("openrouter", "deepseek/deepseek-r1:free"))
    free = BOOK.price(openai("omni-moderation-latest"))
    assert free.version == "free"
    assert free.worst_case(10**6, 0) == 0


def test_the_configuration_overrides_and_a_zero_there_counts() -> None:
    priced = book('[prices."openai/gpt-4o"]\ninput = 1\noutput = "2.5"\nrequest = "0.01"').price(
        openai("gpt-4o")
    )
    assert priced.version == "configuration"
    assert priced.cost(Usage(1_000_000, 1_000_000, 1_000_000, 0)) == 3_510_000_000
    assert book('[prices."openai/x"]\ninput = 0\noutput = 0').price(openai("x")).worst_case(9, 9) == 0


def test_an_embedding_has_no_price_of_output() -> None:
    price = BOOK.price(openai("text-embedding-3-small"))
    assert price.worst_case(1_000_000, 0) == 20_000_000
    with pytest.raises(UnknownPrice):
        price.worst_case(1, 1)


def test_a_price_changes_with_its_date() -> None:
    moment = datetime(2025, 1, 1, tzinfo=UTC)
    dated = PriceBook(Configuration.default(), now=lambda: moment)
    before = dated.price(openai("o3")).input
    moment = NOON
    assert before == 10 * 10**9
    assert dated.price(openai("o3")).input == 2 * 10**9


def test_a_fraction_of_a_nano_is_rounded_up_once() -> None:
    price = book('[prices."openai/x"]\ninput = "0.000001"\noutput = "0.000001"').price(openai("x"))
    assert price.cost(Usage(1, 0, 1, 0)) == 1
    assert price.cost(Usage(500_000, 0, 500_001, 0)) == from_decimal(Decimal("0.000001000001"))


@settings(max_examples=300)
@given(
    model=st.sampled_from(["gpt-4o-mini", "gpt-6-astra", "gpt-5.6-sol", "o3", "gpt-4", "gpt-5.4-pro"]),
    prompt=st.integers(0, 2_000_000),
    completion=st.integers(0, 200_000),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    slack=st.tuples(st.integers(0, 100_000), st.integers(0, 100_000)),
)
def test_no_usage_within_its_bounds_costs_more_than_the_worst_case(
    model: str, prompt: int, completion: int, shares: tuple[float, float], slack: tuple[int, int]
) -> None:
    cached = int(prompt * shares[0])
    written = int((prompt - cached) * shares[1])
    price = BOOK.price(openai(model))
    usage = Usage(prompt, cached, completion, 0, written)
    assert price.cost(usage) <= price.worst_case(prompt + slack[0], completion + slack[1])
