"""Which target a call goes to."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import pytest

from headrace_shared.breaker_gates import gates_of
from headrace_shared.configuration import Configuration, parse_toml
from headrace_shared.dispatch import breakers
from headrace_shared.dispatch.dispatch import Dispatch
from headrace_shared.errors import InvalidConfiguration, InvalidRequest
from headrace_shared.ids import CallNumber, RouteName
from headrace_shared.money import NanoUSD
from headrace_shared.outcome import ErrorClass
from headrace_shared.policy import Timeouts
from headrace_shared.request import Endpoint
from headrace_shared.routes import Fallback, Route, Strategy, Target, Trouble, trouble_of
from headrace_shared.store.configurations import Versioned
from headrace_shared.store.pool import Pool
from headrace_shared.testing.jobs import claimed_job
from headrace_shared.usage import NO_USAGE, Finish
from headrace_workers.breaker import Breakers
from headrace_workers.choosing import Choosing, Met
from headrace_workers.configured import Configured
from headrace_workers.execution import Ask, Run
from headrace_workers.offers import most_cost
from headrace_workers.replies import Answered
from headrace_workers.steps.downgrade import Downgrade
from headrace_workers.strategies import strategy_of

SECOND = timedelta(seconds=1)
EAST, WEST, SPARE, LONG = (Target(name, "m") for name in ("east", "west", "spare", "long"))

CONFIGURATION = """
[providers.east]
base_url = "http://east.example/v1"
[providers.west]
base_url = "http://west.example/v1"
[providers.spare]
base_url = "http://spare.example/v1"
[providers.long]
base_url = "http://long.example/v1"

[routes.m]
strategy = "{strategy}"
targets = [
    {{ provider = "east", model = "m", weight = 3, read_timeout = "20m" }},
    {{ provider = "west", model = "m" }},
]
fallbacks = [
    {{ on = ["down", "rate_limited"], provider = "spare", model = "m" }},
    {{ on = ["context_too_long"], provider = "long", model = "m" }},
]
answer = "Please come back later."

[prices."east/m"]
input = "2.00"
output = "2.00"
[prices."west/m"]
input = "1.00"
output = "1.00"
"""

ONE_TARGET = 'targets = [{ provider = "openai", model = "m" }]\n'


def configuration(strategy: str = "weighted") -> Configuration:
    return parse_toml(CONFIGURATION.format(strategy=strategy), "headrace.toml")


@dataclass
class Known:
    """Facts that a test makes up."""

    weights: Mapping[Target, int] = field(default_factory=dict[Target, int])
    loads: Mapping[Target, int] = field(default_factory=dict[Target, int])
    latencies: Mapping[Target, timedelta] = field(default_factory=dict[Target, timedelta])
    costs: Mapping[Target, int] = field(default_factory=dict[Target, int])

    def weight(self, target: Target) -> int:
        return self.weights.get(target, 1)

    def under_way(self, target: Target) -> int:
        return self.loads.get(target, 0)

    def latency(self, target: Target) -> timedelta | None:
        return self.latencies.get(target)

    def cost(self, target: Target) -> NanoUSD | None:
        return NanoUSD(self.costs[target]) if target in self.costs else None


def drawn(strategy: Strategy, facts: Known, targets: Sequence[Target] = (EAST, WEST)) -> Counter[Target]:
    choose = strategy_of(strategy)
    return Counter(choose(targets, facts) for _ in range(400))


def test_weights_are_shares() -> None:
    found = drawn(Strategy.WEIGHTED, Known(weights={EAST: 3, WEST: 1}))
    assert 240 < found[EAST] < 360
    assert found.total() == 400


def test_the_least_loaded_for_its_weight_is_taken() -> None:
    facts = Known(weights={EAST: 4, WEST: 1}, loads={EAST: 7, WEST: 2})
    assert drawn(Strategy.LEAST_LOADED, facts) == {EAST: 400}
    assert set(drawn(Strategy.LEAST_LOADED, Known())) == {EAST, WEST}, "equals share"


def test_the_one_that_answers_soonest_is_taken_and_an_unknown_one_gets_one_call_to_learn_from() -> None:
    known = Known(latencies={EAST: 2 * SECOND, WEST: SECOND})
    assert drawn(Strategy.LATENCY_AWARE, known) == {WEST: 400}
    unknown = Known(latencies={EAST: SECOND})
    assert drawn(Strategy.LATENCY_AWARE, unknown) == {WEST: 400}
    asked = Known(latencies={EAST: SECOND}, loads={WEST: 1})
    assert drawn(Strategy.LATENCY_AWARE, asked) == {EAST: 400}


def test_the_cheapest_is_taken_and_one_without_a_price_last() -> None:
    assert drawn(Strategy.LOWEST_COST, Known(costs={EAST: 2, WEST: 1})) == {WEST: 400}
    assert drawn(Strategy.LOWEST_COST, Known(costs={EAST: 2})) == {EAST: 400}


def test_a_route_is_what_the_file_says() -> None:
    route = configuration("lowest-cost").resolve_route("m")
    assert (route.targets, route.weights) == ((EAST, WEST), (3, 1))
    assert route.strategy is Strategy.LOWEST_COST
    assert route.fallbacks == (
        Fallback(frozenset({Trouble.DOWN, Trouble.RATE_LIMITED}), SPARE),
        Fallback(frozenset({Trouble.CONTEXT_TOO_LONG}), LONG),
    )
    assert route.all_targets == (EAST, WEST, SPARE, LONG)
    assert route.answer == "Please come back later."
    # What a target leaves out holds as its provider says.
    own = Timeouts(connect=5 * SECOND, read=1200 * SECOND, total=600 * SECOND)
    assert route.timeouts == {EAST: own}
    document = configuration().document()
    assert Configuration.from_document(document) == configuration()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('targets = [{ provider = "openai", model = "m" }]\nstrategy = "fastest"', r"strategy: .*weighted"),
        (
            ONE_TARGET + 'fallbacks = [{ on = ["slow"], provider = "openai", model = "n" }]',
            r"fallbacks\[0\]\.on\[0\]: .*rate_limited",
        ),
        (
            ONE_TARGET + 'fallbacks = [{ on = [], provider = "openai", model = "n" }]',
            r"fallbacks\[0\]\.on: must name any of rate_limited, down",
        ),
        (
            ONE_TARGET + 'fallbacks = [{ on = ["down"], provider = "x", model = "n" }]',
            r"fallbacks\[0\]\.provider: there is no provider 'x'",
        ),
        ('targets = [{ provider = "openai", model = "m" }]\nanswer = ""', r"answer: "),
        (
            'targets = [{ provider = "openai", model = "m" }]\n[providers.static]\nbase_url = "http://x/v1"',
            r"providers\.static: is the name under which a route's own answer is booked",
        ),
    ],
)
def test_what_is_wrong_with_a_route_is_said_with_its_place(text: str, message: str) -> None:
    with pytest.raises(InvalidConfiguration, match=message):
        parse_toml(f"[routes.m]\n{text}", "headrace.toml")


def test_every_error_class_has_its_meaning_for_the_choice() -> None:
    found = {error_class: trouble_of(error_class) for error_class in ErrorClass}
    assert {one for one, trouble in found.items() if trouble is Trouble.DOWN} == {
        ErrorClass.TRANSIENT,
        ErrorClass.TIMEOUT,
        ErrorClass.UNREADABLE,
        ErrorClass.AUTH,
    }
    assert found[ErrorClass.QUOTA_EXHAUSTED] is Trouble.RATE_LIMITED
    assert found[ErrorClass.BAD_REQUEST] is None


def test_a_gate_closes_only_where_nobody_else_answers() -> None:
    document = {
        "routes": {
            "alone": {"targets": [{"provider": "openai", "model": "a"}]},
            "helped": {
                "targets": [{"provider": "openai", "model": "a"}],
                "fallbacks": [{"on": ["down"], "provider": "openai", "model": "b"}],
            },
            "not helped": {
                "targets": [{"provider": "openai", "model": "a"}],
                "fallbacks": [{"on": ["content_filter"], "provider": "openai", "model": "b"}],
            },
        },
    }
    found = gates_of(Configuration.from_document(document), Target("openai", "a"))
    assert [gate.dimension for gate in found] == ["route:alone", "route:not%20helped", "route:a"]


class Limits:
    """Waits that a test makes up."""

    def __init__(self, **seconds: float) -> None:
        self._seconds = seconds

    def wait_of(self, target: Target) -> timedelta:
        return timedelta(seconds=self._seconds.get(target.provider, 0))


def cost(target: Target) -> NanoUSD | None:
    return {EAST: NanoUSD(2), WEST: NanoUSD(1)}.get(target)


@dataclass
class Stage:
    choosing: Choosing
    breakers: Breakers
    route: Route

    def chosen(self, *met: Met) -> set[Target]:
        return {self.choosing.first(self.route, met, cost) for _ in range(60)}

    def onward(self, *met: Met) -> set[Target | None]:
        return {self.choosing.next(self.route, met, cost) for _ in range(60)}


def stage(pool: Pool, dispatch: Dispatch, strategy: str = "weighted", **waits: float) -> Stage:
    found = configuration(strategy)
    configured = Configured(pool, Versioned(0, found))
    known = Breakers(dispatch, configured)
    return Stage(Choosing(configured, known, Limits(**waits)), known, found.resolve_route("m"))


async def trip(stage: Stage, dispatch: Dispatch, target: Target) -> None:
    await breakers.open_(dispatch.redis, target, SECOND * 60, None)
    await stage.breakers.of(target).share()


async def test_a_breaker_steers_and_all_of_them_open_lead_to_the_fallback(
    pool: Pool, dispatch: Dispatch
) -> None:
    here = stage(pool, dispatch)
    assert here.chosen() == {EAST, WEST}
    await trip(here, dispatch, EAST)
    assert here.chosen() == {WEST}
    await trip(here, dispatch, WEST)
    assert here.chosen() == {SPARE}
    await trip(here, dispatch, SPARE)
    assert here.chosen() == {EAST, WEST}, "somebody has to be waited for"
    assert here.onward() == {None}


async def test_a_limit_steers_and_a_long_wait_everywhere_leads_to_the_fallback(
    pool: Pool, dispatch: Dispatch
) -> None:
    assert stage(pool, dispatch, east=0.1).chosen() == {WEST}
    assert stage(pool, dispatch, east=0.1, west=0.2).chosen() == {EAST, WEST}
    assert stage(pool, dispatch, east=30, west=0.2).chosen() == {WEST}
    assert stage(pool, dispatch, east=30, west=30).chosen() == {SPARE}


async def test_what_a_run_met_leads_on(pool: Pool, dispatch: Dispatch) -> None:
    here = stage(pool, dispatch)
    down, limited = Met(EAST, Trouble.DOWN), Met(WEST, Trouble.RATE_LIMITED)
    assert here.onward(down) == {WEST}
    assert here.onward(down, limited) == {SPARE}
    assert here.onward(down, limited, Met(SPARE, Trouble.DOWN)) == {None}
    # The other target is the same model: it would say the same.
    assert here.onward(Met(EAST, Trouble.CONTEXT_TOO_LONG)) == {LONG}
    assert here.onward(Met(EAST, Trouble.CONTENT_FILTER)) == {None}
    assert here.onward(Met(EAST, Trouble.CONTEXT_TOO_LONG), Met(LONG, Trouble.DOWN)) == {None}
    assert here.chosen(Met(EAST, Trouble.CONTEXT_TOO_LONG)) == {LONG}


async def test_loads_latencies_and_prices_are_those_of_the_process(pool: Pool, dispatch: Dispatch) -> None:
    least = stage(pool, dispatch, "least-loaded")
    for _ in range(4):
        least.choosing.taken(EAST)
    least.choosing.taken(WEST)
    assert least.chosen() == {WEST}
    least.choosing.taken(WEST)
    assert least.chosen() == {EAST}
    least.choosing.ended(WEST, None)
    least.choosing.ended(WEST, None)
    assert least.chosen() == {WEST}
    quick = stage(pool, dispatch, "latency-aware")
    for target, seconds in ((EAST, 1), (WEST, 2)):
        quick.choosing.taken(target)
        answered = Answered(SECOND * seconds, 200, None, b"{}", NO_USAGE, Finish.COMPLETE)
        quick.choosing.ended(target, answered)
    assert quick.chosen() == {EAST}
    assert stage(pool, dispatch, "lowest-cost").chosen() == {WEST}


def test_a_call_that_its_budget_sends_elsewhere_is_counted_there(pool: Pool, dispatch: Dispatch) -> None:
    found = stage(pool, dispatch, "least-loaded")
    downgrade = Downgrade(Configured(pool, Versioned(1, configuration())), found.choosing)
    ask = Ask(Endpoint.CHAT_COMPLETIONS, RouteName("m"), b'{"model": "m", "messages": [], "max_tokens": 10}')
    run = Run(
        claimed_job(model="m"), CallNumber(1), 0, ask, target=EAST, timeouts=Timeouts(SECOND, SECOND, SECOND)
    )
    found.choosing.taken(EAST)
    [(instead, most)] = downgrade.cheaper(run, NanoUSD(10**12))
    assert (instead.target, instead.timeouts, instead.downgraded) == (WEST, None, True)
    assert most == most_cost(Configured(pool, Versioned(1, configuration())).now, ask, WEST)
    downgrade.taken(run, instead)
    assert (found.choosing.under_way(EAST), found.choosing.under_way(WEST)) == (0, 1)


def test_what_a_request_costs_at_most_goes_by_what_it_asks_for(pool: Pool) -> None:
    now = Configured(pool, Versioned(1, configuration())).now
    short, long = (
        Ask(Endpoint.CHAT_COMPLETIONS, RouteName("m"), b'{"model":"m","messages":[],"max_tokens":%d}' % most)
        for most in (10, 20)
    )
    assert (most_cost(now, long, EAST) or 0) - (most_cost(now, short, EAST) or 0) == 10 * 2000
    embedding = Ask(Endpoint.EMBEDDINGS, RouteName("m"), b'{"model":"m","input":"Hello"}')
    assert (most_cost(now, embedding, WEST) or 0) < (most_cost(now, embedding, EAST) or 0) < 10**6


def test_a_route_that_is_not_there_is_still_refused() -> None:
    closed = Configuration.from_document({"defaults": {"any_model": False}})
    with pytest.raises(InvalidRequest):
        closed.resolve_route("m")
