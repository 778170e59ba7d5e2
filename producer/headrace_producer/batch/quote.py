"""What a file will cost: at most, and as far as one can tell."""

from dataclasses import dataclass, field

from headrace_producer.batch.lines import BatchRequest
from headrace_producer.in_force import Snapshot
from headrace_shared.ids import RouteName
from headrace_shared.money import ZERO, NanoUSD
from headrace_shared.prices import Price
from headrace_shared.request_bounds import input_bound, output_bound
from headrace_shared.usage import Usage

BYTES_PER_TOKEN = 4
"""Of a prompt, in the expected figure: the usual rule of thumb for English."""

WRITTEN_SHARE = 4
"""The expected answer is a quarter of the longest one allowed."""


@dataclass(frozen=True, slots=True)
class Quote:
    """The tokens and the cost of requests, each answered once.

    `most_*` cannot be exceeded by answers; `expected_*` is a rule of thumb. Calls whose
    answer is lost on the way come on top: they are listed as suspense.
    """

    requests: int = 0
    most_input_tokens: int = 0
    most_output_tokens: int = 0
    most: NanoUSD = ZERO
    expected_input_tokens: int = 0
    expected_output_tokens: int = 0
    expected: NanoUSD = ZERO


@dataclass(slots=True)
class Quoter:
    """Adds up the quotes of requests."""

    snapshot: Snapshot
    _prices: dict[RouteName, tuple[Price, ...]] = field(default_factory=dict[RouteName, tuple[Price, ...]])
    _requests: int = 0
    _most: list[int] = field(default_factory=lambda: [0, 0, 0])
    _expected: list[int] = field(default_factory=lambda: [0, 0, 0])

    def add(self, request: BatchRequest) -> None:
        """Count a request at the dearest of its route's targets and fallbacks, and expect its first one."""
        checked = request.checked
        default = self.snapshot.configuration.defaults.max_output_tokens
        size = len(checked.body)
        read = input_bound(checked.endpoint, request.document, size)
        written = output_bound(checked.endpoint, request.document, default)
        prices = self._prices_of(request.route)
        self._requests += 1
        _add(self._most, read, written, max(price.worst_case(read, written) for price in prices))
        read = min(read, -(-size // BYTES_PER_TOKEN))
        written = -(-written // WRITTEN_SHARE)
        cost = prices[0].cost(Usage(read, 0, written, 0))
        _add(self._expected, read, written, cost)

    def quote(self) -> Quote:
        most_input, most_output, most = self._most
        expected_input, expected_output, expected = self._expected
        return Quote(
            self._requests,
            most_input,
            most_output,
            NanoUSD(most),
            expected_input,
            expected_output,
            NanoUSD(expected),
        )

    def _prices_of(self, route: RouteName) -> tuple[Price, ...]:
        found = self._prices.get(route)
        if found is None:
            targets = self.snapshot.configuration.resolve_route(route).all_targets
            found = self._prices[route] = tuple(self.snapshot.prices.price(target) for target in targets)
        return found


def _add(sums: list[int], read: int, written: int, cost: int) -> None:
    sums[0] += read
    sums[1] += written
    sums[2] += cost
