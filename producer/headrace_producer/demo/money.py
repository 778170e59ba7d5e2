"""What the demo's work can cost at most."""

from collections import defaultdict
from collections.abc import Sequence

from headrace_producer.demo.tasks import Task
from headrace_shared.configuration import Configuration
from headrace_shared.money import NANO_PER_USD, NanoUSD
from headrace_shared.prices import PriceBook
from headrace_shared.request import check_request, prepare

_CENT = NANO_PER_USD // 100


def worst_cases(configuration: Configuration, work: Sequence[Task]) -> dict[str, NanoUSD]:
    """Return the most that one call for each task can cost, summed for each tenant."""
    prices, defaults = PriceBook(configuration), configuration.defaults
    sums: defaultdict[str, int] = defaultdict(int)
    for task in work:
        checked = check_request(task.endpoint, task.body, max_body_bytes=defaults.max_body_bytes)
        target = configuration.resolve_route(checked.model).targets[0]
        ready = prepare(checked.body, checked.endpoint, target.model, defaults.max_output_tokens)
        sums[task.tenant] += prices.price(target).worst_case(ready.input_bound, ready.output_bound)
    return {tenant: NanoUSD(amount) for tenant, amount in sums.items()}


def with_room(worst: NanoUSD) -> NanoUSD:
    """Return a limit that leaves room for what a crash puts in suspense: a half more, in whole cents."""
    return NanoUSD((worst * 3 // 2 // _CENT + 1) * _CENT)
