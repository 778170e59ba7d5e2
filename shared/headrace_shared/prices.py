"""What a target's tokens cost, in integers.

A price comes from the configuration, else from the bundled data of genai-prices, which
is never updated over the network. What neither knows is refused: unknown is not free,
and neither is a listed zero, unless the configuration or the small table here says so.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING

from headrace_shared.configuration import Configuration
from headrace_shared.configuration_sections import PriceSection
from headrace_shared.errors import UnknownPrice, UnknownToolPrice
from headrace_shared.hosted_tools import SEARCHES_A_CALL, WEB_SEARCHES, Hosted, HostedTool
from headrace_shared.money import NanoUSD, from_decimal
from headrace_shared.routes import Target
from headrace_shared.usage import Usage
from headrace_shared.vocabularies import Vocabulary, vocabulary_of

if TYPE_CHECKING:
    from genai_prices.types import ConditionalPrice, ModelPrice, Tier, TieredPrices

TOKENS_PER_PRICE = 1_000_000

CONFIGURED = "configuration"

_PRICES_KEPT = 4096

FREE_MODELS = frozenset(
    ("openai", model)
    for model in (
        "omni-moderation-2024-09-26",
        "omni-moderation-latest",
        "text-moderation-007",
        "text-moderation-latest",
        "text-moderation-stable",
    )
)
"""(price list, model): OpenAI charges nothing for these."""

_TOKEN_PRICES = frozenset({"input_mtok", "cache_read_mtok", "cache_write_mtok", "output_mtok"})
_BESIDE_TOKENS = frozenset(
    {
        "audio_hours",
        "cache_audio_read_mtok",
        "cache_write_1h_mtok",
        "input_audio_hours",
        "input_audio_mtok",
        "output_audio_mtok",
        "storage_searches_kcount",
        "web_searches_kcount",
    }
)
"""Charges that no token of an accepted request causes: audio is refused, no request asks for a cache of an
hour, and hosted tools are charged by the call."""

_BY_THE_BLOCK = ("gpt-4o-mini", "gpt-4.1-mini")
"""Models of which a web search costs a fixed block of tokens besides: only the configuration knows."""

_SEARCHING = ("-search-preview", "-search-api")
"""Models that charge for a search with every request, which the price data leaves out."""


@dataclass(frozen=True, slots=True)
class PriceStep:
    """Nano-USD per million tokens, for prompts of more than ``above`` tokens."""

    above: int
    input: int
    cached_input: int
    cache_write: int
    output: int | None
    """None: the price list names no price of output, as for embeddings."""


@dataclass(frozen=True, slots=True)
class Price:
    """What one target costs: nano-USD per million tokens, in steps by the prompt's length."""

    target: Target
    version: str
    """Where it is from: ``genai-prices 0.2.3``, ``configuration`` or ``free``."""
    request: int
    """Nano-USD of every call, whatever its tokens."""
    steps: tuple[PriceStep, ...]
    """Ascending by ``above``; the first one is above -1."""
    vocabulary: Vocabulary | None = None
    """What its tokens are counted in; None where nobody knows, and bytes bound them."""
    tools: Mapping[HostedTool, int] = field(default_factory=dict[HostedTool, int], hash=False)
    """Nano-USD of what is charged each time, of the tools that are known."""
    context: int | None = None
    """The most tokens that the model reads at once, where the configuration says so."""

    @property
    def input(self) -> int:
        return self.steps[0].input

    @property
    def cached_input(self) -> int:
        return self.steps[0].cached_input

    @property
    def output(self) -> int | None:
        return self.steps[0].output

    def cost(self, usage: Usage, hosted: Hosted | None = None) -> NanoUSD:
        """Return what a call cost: exact, then rounded up to a nano-dollar once.

        Args:
            usage: what the provider counted.
            hosted: the tools that it might run.

        """
        prompt, cached, written = usage.prompt_tokens, usage.cached_tokens, usage.cache_write_tokens
        step = self.steps[0]
        for later in self.steps[1:]:
            if prompt > later.above:
                step = later
        total = (
            (prompt - cached - written) * step.input
            + cached * step.cached_input
            + written * step.cache_write
            + usage.completion_tokens * (step.output or 0)
        )
        tools = sum(usage.tools.of(tool) * self._tool(tool) for tool in hosted.tools) if hosted else 0
        return NanoUSD(self.request - -total // TOKENS_PER_PRICE + tools)

    def worst_case(self, input_tokens: int, output_tokens: int, hosted: Hosted | None = None) -> NanoUSD:
        """Return the most a call can cost that reads and writes up to that many tokens.

        With hosted tools it reads as often as they let it, up to all that the model can.

        Raises:
            UnknownPrice: output, or a tool, is asked for and has no price, or the context is unknown.

        """
        tools = 0
        if hosted is not None:
            if self.context is None:
                raise UnknownToolPrice(target=str(self.target), tool=hosted.tools[0], missing="context")
            input_tokens = hosted.readings * self.context
            tools = hosted.calls * max(map(self._most_of_call, hosted.tools))
        most = 0
        for step in self.steps:
            if step.above >= input_tokens:
                break
            if step.output is None and output_tokens:
                raise UnknownPrice(target=str(self.target))
            dearest = max(step.input, step.cached_input, step.cache_write)
            most = max(most, input_tokens * dearest + output_tokens * (step.output or 0))
        return NanoUSD(self.request - -most // TOKENS_PER_PRICE + tools)

    def _most_of_call(self, tool: HostedTool) -> int:
        return self._tool(tool) * (SEARCHES_A_CALL if tool in WEB_SEARCHES else 1)

    def _tool(self, tool: HostedTool) -> int:
        price = self.tools.get(tool)
        if price is None:
            raise UnknownToolPrice(target=str(self.target), tool=tool, missing=f"tools.{tool}")
        return price


def utc_now() -> datetime:
    return datetime.now(UTC)


class PriceBook:
    """The prices of one configuration, each looked up once."""

    def __init__(self, configuration: Configuration, *, now: Callable[[], datetime] = utc_now) -> None:
        self._configuration = configuration
        self._now = now
        self._lasting: dict[Target, Price] = {}
        self._dated: dict[Target, _DatedPrice] = {}

    def price(self, target: Target) -> Price:
        """Return the price of a target; it may be another one at another time of the day or year.

        Raises:
            UnknownPrice: nobody says what the target costs, or its price has a part that cannot be held.

        """
        lasting = self._lasting.get(target)
        if lasting is not None:
            return lasting
        dated = self._dated.get(target)
        return dated.at(self._now()) if dated is not None else self._look_up(target)

    def _look_up(self, target: Target) -> Price:
        configured = self._configuration.prices.get(str(target))
        if target.provider not in self._configuration.providers:
            raise UnknownPrice(target=str(target))
        priced_as = self._configuration.provider(target.provider).priced_as
        vocabulary = vocabulary_of(priced_as, target.model)

        def complete(price: Price) -> Price:
            price = replace(price, vocabulary=vocabulary)
            return price if configured is None else _with_tools(price, configured)

        if configured is not None and configured.input is not None and configured.output is not None:
            price = _from_configuration(target, configured, configured.input, configured.output)
        elif (priced_as, target.model) in FREE_MODELS:
            price = Price(target, "free", 0, (PriceStep(-1, 0, 0, 0, 0),))
        else:
            found = _from_price_data(target, priced_as)
            if isinstance(found, _DatedPrice):
                self._dated[target] = dated = found.each(complete)
                return dated.at(self._now())
            price = found
        if len(self._lasting) >= _PRICES_KEPT:
            self._lasting.clear()
        self._lasting[target] = price = complete(price)
        return price


@dataclass(frozen=True, slots=True)
class _DatedPrice:
    """Prices that begin at a date or hold at a time of day; the last one in force counts."""

    alternatives: tuple[tuple["ConditionalPrice", Price], ...]

    def at(self, moment: datetime) -> Price:
        for condition, price in reversed(self.alternatives):
            if condition.constraint is None or condition.constraint.active(moment):
                return price
        return self.alternatives[0][1]

    def each(self, change: Callable[[Price], Price]) -> "_DatedPrice":
        return _DatedPrice(tuple((when, change(price)) for when, price in self.alternatives))


def _with_tools(price: Price, section: PriceSection) -> Price:
    own = {tool: from_decimal(dollars) for tool, dollars in section.tools.items()}
    is_mixed = own and price.version != CONFIGURED
    version = f"{price.version}, tools as configured" if is_mixed else price.version
    return replace(price, version=version, tools={**price.tools, **own}, context=section.context)


def _from_configuration(target: Target, section: PriceSection, read: Decimal, written: Decimal) -> Price:
    entry = from_decimal(read)
    step = PriceStep(
        above=-1,
        input=entry,
        cached_input=entry if section.cached_input is None else from_decimal(section.cached_input),
        cache_write=entry if section.cache_write is None else from_decimal(section.cache_write),
        output=from_decimal(written),
    )
    return Price(target, CONFIGURED, from_decimal(section.request), (step,))


def _from_price_data(target: Target, priced_as: str) -> "Price | _DatedPrice":
    # Imported with the first price that needs it: the data costs a quarter of a second and 70 MB.
    import genai_prices  # noqa: PLC0415
    from genai_prices.data_snapshot import get_snapshot  # noqa: PLC0415

    version = f"genai-prices {genai_prices.__version__}"
    providers = get_snapshot().providers
    # By its exact id: the library's own look-up also takes names that resemble one, and keeps every miss.
    provider = next((each for each in providers if each.id == priced_as), None)
    model = provider.find_model(target.model, all_providers=providers) if provider else None
    if model is None or any(mark in target.model for mark in _SEARCHING):
        raise UnknownPrice(target=str(target))
    if isinstance(model.prices, list):
        return _DatedPrice(
            tuple((each, _from_model_price(target, version, each.prices)) for each in model.prices)
        )
    return _from_model_price(target, version, model.prices)


def _from_model_price(target: Target, version: str, listed: "ModelPrice") -> Price:
    parts: dict[str, Decimal | TieredPrices] = {
        name: value for name, value in vars(listed).items() if value is not None
    }
    request = parts.pop("requests_kcount", Decimal(0))
    if "input_mtok" not in parts or parts.keys() - _TOKEN_PRICES - _BESIDE_TOKENS:
        raise UnknownPrice(target=str(target))
    starts = {-1} | {tier.start for name in _TOKEN_PRICES & parts.keys() for tier in _tiers(parts[name])}
    steps = tuple(_step(parts, start) for start in sorted(starts))
    if not isinstance(request, Decimal) or not any(step.input or step.output for step in steps):
        raise UnknownPrice(target=str(target))
    return Price(target, version, from_decimal(request / 1000), steps, tools=_tools(target, parts))


def _tools(target: Target, parts: "Mapping[str, Decimal | TieredPrices]") -> dict[HostedTool, int]:
    searches, files = parts.get("web_searches_kcount"), parts.get("storage_searches_kcount")
    found: dict[HostedTool, int] = {}
    if isinstance(searches, Decimal) and not target.model.startswith(_BY_THE_BLOCK):
        found[HostedTool.WEB_SEARCH] = from_decimal(searches / 1000)
    if isinstance(files, Decimal):
        found[HostedTool.FILE_SEARCH] = from_decimal(files / 1000)
    return found


def _step(parts: "dict[str, Decimal | TieredPrices]", above: int) -> PriceStep:
    def nano(name: str) -> int | None:
        part = parts.get(name)
        return None if part is None else from_decimal(_at(part, above))

    entry = nano("input_mtok") or 0
    cached, written = nano("cache_read_mtok"), nano("cache_write_mtok")
    return PriceStep(
        above=above,
        input=entry,
        cached_input=entry if cached is None else cached,
        cache_write=entry if written is None else written,
        output=nano("output_mtok"),
    )


def _at(part: "Decimal | TieredPrices", above: int) -> Decimal:
    if isinstance(part, Decimal):
        return part
    reached = [tier.price for tier in part.tiers if tier.start <= above]
    return reached[-1] if reached else part.base


def _tiers(part: "Decimal | TieredPrices") -> "list[Tier]":
    return [] if isinstance(part, Decimal) else part.tiers
