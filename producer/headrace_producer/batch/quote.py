"""What a file will cost: at most, and by what answers to its templates were like before."""

import heapq
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import TypeAlias

from headrace_producer.batch.expecting import Alike, Group, Quote, Sums
from headrace_producer.batch.lines import BatchRequest
from headrace_producer.in_force import Snapshot
from headrace_shared.fingerprints import fingerprints
from headrace_shared.ids import RouteName
from headrace_shared.prices import Price
from headrace_shared.sketches import Sketch, SketchKey

Seen: TypeAlias = Callable[[Collection[SketchKey]], Awaitable[Mapping[SketchKey, Sketch]]]
"""Returns what is known of templates and models."""

MOST_ASKED = 1_000
"""Templates of one file that are looked up: those with the most requests."""


async def nothing_seen(_keys: Collection[SketchKey]) -> Mapping[SketchKey, Sketch]:
    """Know nothing."""
    return {}


@dataclass(slots=True)
class Quoter:
    """Adds up the quotes of requests."""

    snapshot: Snapshot
    _prices: dict[RouteName, tuple[Price, ...]] = field(default_factory=dict[RouteName, tuple[Price, ...]])
    _groups: dict[Alike, Group] = field(default_factory=dict[Alike, Group])

    def add(self, request: BatchRequest) -> None:
        """Count a request at the dearest of its route's targets and fallbacks, and expect its first one."""
        checked = request.checked
        default = self.snapshot.configuration.defaults.max_output_tokens
        size = checked.size
        read, written = checked.bounds.input(size), checked.bounds.output(default)
        templates = fingerprints(checked.endpoint, request.document)
        alike = Alike(request.route, templates, written, size.bit_length())
        group = self._groups.get(alike)
        if group is None:
            group = self._groups[alike] = Group()
        group.requests += 1
        group.body_bytes += size
        group.most_input_tokens += read
        hosted = checked.bounds.hosted
        worst = max([price.worst_case(read, written, hosted) for price in self._prices_of(request.route)])
        group.most += worst
        group.dearest = max(group.dearest, worst)

    async def quote(self, seen: Seen = nothing_seen) -> Quote:
        """Look up what is known of the requests that were added, and sum up."""
        sums = Sums(await seen(self._keys()))
        for alike, group in self._groups.items():
            sums.add(alike, group, self._prices_of(alike.route)[0])
        return sums.quote()

    def _keys(self) -> list[SketchKey]:
        """Return where to look, the most wanted first."""
        counts: dict[tuple[str, str], defaultdict[str, int]] = {}
        for alike, group in self._groups.items():
            target = self._prices_of(alike.route)[0].target
            counted = counts.setdefault((target.provider, target.model), defaultdict(int))
            for template in (*alike.templates, ""):
                counted[template] += group.requests
        wanted = ((count, *target, name) for target, found in counts.items() for name, count in found.items())
        return [SketchKey(*key) for _, *key in heapq.nlargest(MOST_ASKED, wanted, key=itemgetter(0))]

    def _prices_of(self, route: RouteName) -> tuple[Price, ...]:
        found = self._prices.get(route)
        if found is None:
            targets = self.snapshot.configuration.resolve_route(route).all_targets
            found = self._prices[route] = tuple(self.snapshot.prices.price(target) for target in targets)
        return found
