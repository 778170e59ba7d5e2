"""Tools that the provider runs: held for at their worst, and booked as the provider's own books have them."""

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from datetime import timedelta
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace_producer import Headrace
from headrace_shared.budgets import Budgets
from headrace_shared.configuration import Configuration, parse_toml
from headrace_shared.dispatch.dispatch import Dispatch
from headrace_shared.errors import InvalidConfiguration, InvalidInput, InvalidRequest, UnknownPrice
from headrace_shared.hosted_tools import SEARCHES_A_CALL, Hosted, HostedTool, ToolCalls
from headrace_shared.ids import WorkerId
from headrace_shared.job import NEEDS_EXPIRY, NEEDS_MAX_COST, JobState
from headrace_shared.job import NEEDS_HOSTED_TOOLS as NEEDED
from headrace_shared.money import NanoUSD
from headrace_shared.outcome import ErrorClass
from headrace_shared.prices import Price, PriceBook, PriceStep
from headrace_shared.request import Endpoint, check_request, prepare
from headrace_shared.routes import Target
from headrace_shared.store import claims
from headrace_shared.store.claims import Abilities
from headrace_shared.store.money import BudgetPolicy, WindowKind
from headrace_shared.store.pool import Pool
from headrace_shared.testing.bill import bill
from headrace_shared.testing.jobs import Jobs
from headrace_shared.testing.scripted_provider import Scripted, ScriptedProvider
from headrace_shared.testing.simulated_provider import SimulatedProvider
from headrace_shared.usage import Usage, read_usage
from headrace_workers.testing import running_worker

RESPONSES = Endpoint.RESPONSES
CONTEXT = 100_000
TOOLS = {
    "web_search": "0.01",
    "web_search_preview": "0.025",
    "file_search": "0.0025",
    "code_interpreter": "0.03",
}
PRICES = {"openai/m": {"input": "1", "output": "10", "context": CONTEXT, "tools": TOOLS}}
TOKEN, WRITTEN = 1_000, 10_000
SEARCH, FILES, CONTAINER = 10_000_000, 2_500_000, 30_000_000


def respond(*tools: str, calls: int | None = 3, **fields: object) -> dict[str, object]:
    allowed = {} if calls is None else {"max_tool_calls": calls}
    given = [{"type": tool} for tool in tools]
    return {"model": "m", "input": "Hi", "max_output_tokens": 50, "tools": given, **allowed, **fields}


def hosted_of(body: Mapping[str, object]) -> Hosted | None:
    checked = check_request(RESPONSES, body, max_body_bytes=10_000)
    return prepare(checked.body, RESPONSES, "m", 1).hosted


def test_what_a_request_allows_is_read_with_it() -> None:
    function = {"type": "function", "name": "f"}
    assert hosted_of(respond(calls=None, tools=[function])) is None
    assert hosted_of(respond("file_search", "web_search", "file_search", calls=7)) == Hosted(
        (HostedTool.WEB_SEARCH, HostedTool.FILE_SEARCH), 7
    )
    dated = respond("web_search_preview_2025_03_11", "code_interpreter")
    assert hosted_of(dated) == Hosted((HostedTool.WEB_SEARCH_PREVIEW, HostedTool.CODE_INTERPRETER), 3)


@pytest.mark.parametrize(
    ("body", "field", "reason"),
    [
        (respond("web_search", calls=None), "max_tool_calls", "cannot be bounded under a hard budget"),
        (respond("web_search", calls=129), "max_tool_calls", "at most 128"),
        (respond("web_search", calls=0), "max_tool_calls", "positive"),
        (respond("web_search", "web_search_preview"), "tools", "two kinds of web search"),
        (respond("web_search", "mcp"), "tools[1].type", "cannot be bounded under a hard budget"),
    ],
)
def test_what_would_have_no_bound_is_refused(body: Mapping[str, object], field: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason) as refused:
        hosted_of(body)
    assert refused.value.field == field


def book(document: Mapping[str, object]) -> PriceBook:
    return PriceBook(Configuration.from_document({"prices": document}))


def price_of(document: Mapping[str, object], model: str = "m") -> Price:
    return book(document).price(Target("openai", model))


def test_the_worst_case_reads_the_whole_context_each_time_and_makes_every_call_at_the_dearest() -> None:
    price = price_of(PRICES)
    searching = Hosted((HostedTool.WEB_SEARCH, HostedTool.FILE_SEARCH), 3)
    read = 5 * CONTEXT * TOKEN + 50 * WRITTEN
    assert price.worst_case(10, 50, searching) == read + 3 * SEARCHES_A_CALL * SEARCH
    coding = Hosted((HostedTool.FILE_SEARCH, HostedTool.CODE_INTERPRETER), 3)
    assert price.worst_case(10, 50, coding) == read + 3 * CONTAINER
    assert price.worst_case(10, 50) == 10 * TOKEN + 50 * WRITTEN


KINDS = st.lists(st.sampled_from(list(HostedTool)), min_size=1, unique=True).map(sorted)


@given(kinds=KINDS, allowed=st.integers(1, 128), data=st.data())
def test_no_answer_within_its_bounds_costs_more_than_the_worst_case(
    kinds: list[HostedTool], allowed: int, data: st.DataObject
) -> None:
    usd = 10**9
    short = PriceStep(-1, usd, 2 * usd, usd // 2, usd)
    long = PriceStep(150_000, 7 * usd, usd, 9 * usd, 2 * usd)
    prices = {tool: 10 ** (5 + place) for place, tool in enumerate(HostedTool)}
    price = replace(price_of(PRICES), steps=(short, long), tools=prices)
    hosted = Hosted(tuple(kinds), allowed)
    calls = dict.fromkeys(HostedTool, 0)
    for tool in data.draw(st.lists(st.sampled_from(kinds), max_size=allowed)):
        calls[tool] += SEARCHES_A_CALL if "web" in tool else 1
    web = calls[HostedTool.WEB_SEARCH] + calls[HostedTool.WEB_SEARCH_PREVIEW]
    if {HostedTool.WEB_SEARCH, HostedTool.WEB_SEARCH_PREVIEW} <= set(kinds):
        return  # refused
    tools = ToolCalls(web, calls[HostedTool.FILE_SEARCH], calls[HostedTool.CODE_INTERPRETER])
    prompt = data.draw(st.integers(0, hosted.readings)) * CONTEXT
    cached = data.draw(st.integers(0, prompt))
    usage = Usage(prompt, cached, data.draw(st.integers(0, 50)), 0, 0, tools)
    assert price.cost(usage, hosted) <= price.worst_case(10, 50, hosted)


@pytest.mark.parametrize(
    ("model", "tool", "section", "missing"),
    [
        ("m", "web_search", {"input": "1", "output": "1"}, "set context under"),
        ("m", "web_search", {"input": "1", "output": "1", "context": 9}, "set tools.web_search under"),
        ("m", "file_search", {**PRICES["openai/m"], "tools": {"web_search": "1"}}, "set tools.file_search"),
        ("gpt-4.1", "code_interpreter", {"context": 9}, "set tools.code_interpreter under"),
        # It costs more where the model does not reason: the bundled price is that of the other kind.
        ("gpt-4.1", "web_search_preview", {"context": 9}, "set tools.web_search_preview under"),
        # Each search costs a block of tokens besides.
        ("gpt-4o-mini", "web_search", {"context": 9}, "set tools.web_search under"),
    ],
)
@pytest.mark.usefixtures("environment")
async def test_a_tool_without_a_price_is_refused_when_it_is_asked_for(
    jobs: Jobs, model: str, tool: str, section: Mapping[str, object], missing: str
) -> None:
    await jobs.configure({"prices": {f"openai/{model}": section}})
    async with Headrace() as headrace:
        with pytest.raises(UnknownPrice, match=missing):
            await headrace.enqueue(RESPONSES, {**respond(tool), "model": model})
    assert (await jobs.pool.fetchval("SELECT count(*) FROM headrace.jobs")) == 0


def test_the_bundled_list_knows_some_tools_and_the_configuration_comes_before_it() -> None:
    listed = price_of({"openai/gpt-4.1": {"context": 1_047_576}}, "gpt-4.1")
    assert listed.tools == {HostedTool.WEB_SEARCH: SEARCH, HostedTool.FILE_SEARCH: FILES}
    assert (listed.context, listed.version[:12]) == (1_047_576, "genai-prices")
    own = price_of({"openai/gpt-4.1": {"context": 9, "tools": {"web_search": "0.02"}}}, "gpt-4.1")
    assert own.tools == {HostedTool.WEB_SEARCH: 2 * SEARCH, HostedTool.FILE_SEARCH: FILES}
    assert own.steps == listed.steps
    assert own.version == f"{listed.version}, tools as configured"
    # Prices that begin at a date are completed alike.
    assert price_of({"openai/o3": {"context": 200_000}}, "o3").context == 200_000


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ("output = 1", 'prices."openai/m".input'),
        ("input = 1", 'prices."openai/m".output'),
        ("context = 1\ninput = 1", 'prices."openai/m".output'),
        ("context = 1\noutput = 1", 'prices."openai/m".output'),
        ("context = 0", 'prices."openai/m".context'),
        ("context = 1\ntools = { browser = 1 }", 'prices."openai/m".tools'),
    ],
)
def test_half_a_price_is_no_price(keys: str, reason: str) -> None:
    with pytest.raises(InvalidConfiguration, match=reason):
        parse_toml(f'[prices."openai/m"]\n{keys}', "headrace.toml")


def answer(*output: object, **fields: object) -> Scripted:
    usage = {"input_tokens": 9_000, "output_tokens": 40, "total_tokens": 9_040}
    body = {"object": "response", "status": "completed", "output": list(output), "usage": usage, **fields}
    return Scripted(body=json.dumps(body).encode())


def searched(*queries: str) -> dict[str, object]:
    return {"type": "web_search_call", "action": {"type": "search", "queries": list(queries)}}


OPENED = {"type": "web_search_call", "action": {"type": "open_page", "url": "https://example.com"}}
FOUND = {"type": "web_search_call", "action": {"type": "find_in_page", "url": "u", "pattern": "p"}}
FILED = {"type": "file_search_call", "queries": ["a", "b"]}


def ran(container: str) -> dict[str, object]:
    return {"type": "code_interpreter_call", "container_id": container}


@pytest.mark.parametrize(
    ("given", "calls"),
    [
        (answer(), ToolCalls()),
        (answer(searched("a"), OPENED, FOUND, searched("a", "b"), searched()), ToolCalls(web_searches=4)),
        (answer({"type": "web_search_call"}), ToolCalls(web_searches=1)),
        (
            answer(searched("a", "b"), tool_usage={"web_search": {"num_requests": 1}}),
            ToolCalls(web_searches=1),
        ),
        (answer(searched("a"), tool_usage={"web_search": {"num_requests": -1}}), ToolCalls(web_searches=1)),
        (answer(searched("a"), tool_usage=7), ToolCalls(web_searches=1)),
        (answer(FILED, FILED, ran("x"), ran("x"), ran("y")), ToolCalls(file_searches=2, containers=2)),
        (answer(ran("x"), 7, {"type": ["file_search_call"]}), ToolCalls(containers=1)),
    ],
)
def test_the_calls_of_an_answer_are_counted_as_they_are_charged(given: Scripted, calls: ToolCalls) -> None:
    usage = read_usage(RESPONSES, given.body)
    assert usage is not None
    assert usage.tools == calls


@pytest.fixture
async def jobs(pool: Pool, dispatch: Dispatch) -> Jobs:
    jobs = Jobs(pool, dispatch)
    await jobs.configure({"prices": PRICES})
    return jobs


@pytest.fixture
async def recording(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SimulatedProvider]:
    async with SimulatedProvider(record=True) as provider:
        monkeypatch.setenv("OPENAI_API_KEY", "sk-simulated")
        monkeypatch.setenv("OPENAI_BASE_URL", provider.url)
        yield provider


@pytest.mark.usefixtures("environment")
async def test_what_is_booked_is_tokens_and_tools_and_what_was_held_is_their_worst_case(
    jobs: Jobs, scripted: ScriptedProvider
) -> None:
    scripted.script(answer(searched("a", "b"), OPENED, FILED, ran("x")))
    body = respond("web_search", "file_search", "code_interpreter", calls=4)
    async with running_worker():
        [job] = await jobs.add(model="m", endpoint=RESPONSES, body=body)
        await jobs.ended([job])
    [call] = await jobs.calls(job)
    assert call["held_nano"] == 6 * CONTEXT * TOKEN + 50 * WRITTEN + 4 * SEARCHES_A_CALL * SEARCH
    assert call["cost_nano"] == 9_000 * TOKEN + 40 * WRITTEN + 2 * SEARCH + FILES + CONTAINER
    assert call["price_version"] == "configuration"
    assert await jobs.spend() == await jobs.ledger()
    sent = json.loads(scripted.requests[0])
    assert (sent["max_tool_calls"], sent["max_output_tokens"]) == (4, 50)


@pytest.mark.usefixtures("environment")
async def test_the_provider_bills_what_the_ledger_has_and_less_than_was_held(
    jobs: Jobs, recording: SimulatedProvider
) -> None:
    combinations = [
        ("web_search",),
        ("file_search",),
        ("code_interpreter",),
        ("web_search_preview", "code_interpreter"),
        ("file_search", "web_search", "code_interpreter"),
        (),
    ]
    async with running_worker():
        ids = [
            job
            for number, tools in enumerate(combinations * 3)
            for job in await jobs.add(
                model="m", endpoint=RESPONSES, body=respond(*tools, calls=9, input=f"Question {number}")
            )
        ]
        await jobs.ended(ids)
    requests = recording.books.requests
    calls = [call for job in ids for call in await jobs.calls(job)]
    assert [call["state"] for call in calls] == ["answered"] * len(ids)
    assert all(call["held_nano"] >= call["cost_nano"] for call in calls)
    billed = bill(Configuration.from_document({"prices": PRICES}), "openai", requests)
    assert sum(call["cost_nano"] for call in calls) == billed
    # And once more by hand: a preview costs two and a half times as much as the other kind of search.
    used = [(one.usage, one.hosted) for one in requests if one.usage is not None]
    in_all = sum((usage.tools for usage, _ in used), ToolCalls())
    previews = sum(
        usage.tools.web_searches
        for usage, hosted in used
        if hosted and HostedTool.WEB_SEARCH_PREVIEW in hosted.tools
    )
    assert min(in_all.web_searches, previews, in_all.file_searches, in_all.containers) > 2
    tokens = sum(usage.prompt * TOKEN + usage.completion * WRITTEN for usage, _ in used)
    searches = in_all.web_searches * SEARCH + previews * SEARCH * 3 // 2
    assert billed == tokens + searches + in_all.file_searches * FILES + in_all.containers * CONTAINER


@pytest.mark.usefixtures("environment")
async def test_a_budget_must_have_room_for_all_that_the_tools_could_come_to(
    jobs: Jobs, budgets: Budgets, scripted: ScriptedProvider
) -> None:
    """The same question fits without them."""
    scripted.script(answer(usage={"input_tokens": 9, "output_tokens": 3}))
    most = 5 * CONTEXT * TOKEN + 50 * WRITTEN + 3 * SEARCHES_A_CALL * SEARCH

    async def run(room: int, *tools: str) -> str:
        await budgets.set("model:m", WindowKind.TOTAL, NanoUSD(room), BudgetPolicy.REJECT)
        [job] = await jobs.add(model="m", endpoint=RESPONSES, body=respond(*tools))
        [ending] = await jobs.ended([job])
        return ending.job.error_class or ending.job.state

    async with running_worker():
        assert await run(most - 1) == JobState.SUCCEEDED
        spent = 9 * TOKEN + 3 * WRITTEN
        assert await run(spent + most - 1, "web_search") == ErrorClass.BUDGET_EXHAUSTED
        assert await run(spent + most, "web_search") == JobState.SUCCEEDED
    assert len(scripted.requests) == 2


@pytest.mark.usefixtures("environment")
async def test_a_price_that_is_gone_when_the_job_runs_makes_no_call(
    jobs: Jobs, scripted: ScriptedProvider
) -> None:
    [job] = await jobs.add(model="m", endpoint=RESPONSES, body=respond("web_search"))
    await jobs.configure({"prices": {"openai/m": {"input": "1", "output": "10"}}})
    async with running_worker():
        [ending] = await jobs.ended([job])
    assert ending.job.error_class == ErrorClass.UNKNOWN_PRICE
    assert not scripted.requests


@pytest.mark.usefixtures("environment")
async def test_a_worker_of_the_version_before_leaves_such_a_job_to_others(
    jobs: Jobs, headrace: Headrace, scripted: ScriptedProvider
) -> None:
    """It would hold for its bytes alone: so do those who replace another request with it."""
    scripted.script(Scripted(400, b"{}"))
    before = Abilities(needs=(NEEDS_EXPIRY, NEEDS_MAX_COST))
    plain = await headrace.enqueue(RESPONSES, respond(calls=None))
    async with running_worker():
        await jobs.ended([plain.id])
    again = await plain.retry(respond("web_search"))
    new = await headrace.enqueue(RESPONSES, respond("file_search"))
    ids = [again.id, new.id]
    assert [(await jobs.row(job))["needs"] for job in (plain.id, *ids)] == [[], [NEEDED], [NEEDED]]
    claim = partial(claims.claim_jobs, jobs.pool, ids, WorkerId("w"), timedelta(seconds=30))
    assert (await claim(abilities=before)).jobs == []
    assert len((await claim()).jobs) == len(ids)


def test_an_unknown_tool_price_is_an_unknown_price() -> None:
    with pytest.raises(InvalidInput, match=r'web_search .* openai/m .* \[prices."openai/m"\]'):
        price_of({"openai/m": {"input": "1", "output": "1"}}).worst_case(
            1, 1, Hosted((HostedTool.WEB_SEARCH,), 1)
        )
