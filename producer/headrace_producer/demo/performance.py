"""The demo from the first job to the last word."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.text import Text

from headrace_producer import JobHandle, JobRequest
from headrace_producer.beside import beside
from headrace_producer.demo import ledger, money
from headrace_producer.demo.answering import Answering, confirm
from headrace_producer.demo.answers import show_answers
from headrace_producer.demo.disturbances import Crash, Outage, cause_outage, kill_a_worker
from headrace_producer.demo.observer import Observer, Stalled
from headrace_producer.demo.report import as_json, judgement_of, table_of
from headrace_producer.demo.screen import Screen
from headrace_producer.demo.shows import Show, open_show
from headrace_producer.demo.stage import Stage, open_stage
from headrace_producer.demo.verdict import Facts, callbacks_of, claims_of
from headrace_producer.processes import ProcessEnded
from headrace_shared.budgets import HOLD_LEASE
from headrace_shared.configuration import parse_toml
from headrace_shared.money import NanoUSD, format_usd
from headrace_shared.routes import Target
from headrace_shared.store.money import BudgetPolicy, WindowKind
from headrace_shared.testing.bill import bill


@dataclass(frozen=True, slots=True)
class Ending:
    """How the demo ended."""

    good: bool
    """Every claim holds."""
    answer: Mapping[str, object]


_CALLBACK_SECONDS = 60.0
_HOLD_SECONDS = HOLD_LEASE.total_seconds() + 15
_POLL_SECONDS = 0.05
_NOTICED_SECONDS = 2.0


async def run(
    answering: Answering, jobs: int | None, directory: Path, *, agreed: bool, stderr: bool
) -> Ending:
    """Run the demo in a directory, and end everything that it started."""
    began = time.monotonic()
    with Screen(stderr=stderr) as screen:
        try:
            async with open_show(answering, jobs, directory, screen) as show:
                if answering is Answering.OPENAI and not _agreed(show, agreed=agreed):
                    screen.event("nothing was called")
                    return Ending(good=False, answer={"ok": False, "reason": "not agreed"})
                async with open_stage(show.plan, directory, screen) as stage:
                    facts = await _perform(show, stage, screen)
                    claims = claims_of(facts)
                    if not all(claim.holds for claim in claims):
                        await _explain(stage, screen)
        except (ProcessEnded, Stalled, TimeoutError) as error:
            screen.event(str(error) or "something took too long to start", "bold red")
            return Ending(good=False, answer={"ok": False, "reason": str(error)})
        screen.show(table_of(facts))
        screen.show(judgement_of(claims))
    good = all(claim.holds for claim in claims)
    return Ending(good, as_json(facts, claims, answering, time.monotonic() - began))


def _agreed(show: Show, *, agreed: bool) -> bool:
    worst = money.worst_cases(parse_toml(show.plan.toml, "demo"), show.work)
    limit = NanoUSD(sum(money.with_room(amount) for amount in worst.values()))
    return confirm(len(show.work), limit, agreed=agreed)


async def _explain(stage: Stage, screen: Screen) -> None:
    for line in await ledger.failures(stage.pool):
        screen.event(line, "red")
    for worker in stage.workers:
        screen.show(Text(worker.last_words()))


async def _perform(show: Show, stage: Stage, screen: Screen) -> Facts:
    """Run all jobs through everything that is done to them, and find out what happened."""
    limit = await _set_budgets(show, stage, screen)
    handles = await _enqueue(show, stage, screen)
    observer = Observer(stage, screen, tuple(Target(show.provider, model) for model in show.models))
    await observer.look()
    outage, crash = await beside(observer.run(), _disturb(show, stage, observer, screen))
    screen.stop_bar()
    await _until_called_back(stage, len(handles), screen)
    await _until_nothing_is_held(observer, screen)
    await show_answers(zip(show.work[: show.answers_shown], handles, strict=False), screen)
    books = (
        bill(stage.configuration, show.provider, show.simulated.books.requests) if show.simulated else None
    )
    return Facts(
        enqueued=frozenset(handle.id for handle in handles),
        now=observer.now,
        totals=await ledger.totals(stage.pool),
        limit=limit,
        over_budget=observer.over_budget,
        held=observer.held,
        callbacks=callbacks_of(stage.receivers),
        books=books,
        outage=outage,
        crash=crash,
        crash_planned=show.crash,
    )


async def _set_budgets(show: Show, stage: Stage, screen: Screen) -> NanoUSD:
    total = 0
    for tenant, worst in money.worst_cases(stage.configuration, show.work).items():
        limit = money.with_room(worst)
        await stage.budgets.set(f"tenant:{tenant}", WindowKind.TOTAL, limit, BudgetPolicy.WAIT)
        screen.event(f"budget of tenant {tenant}: {format_usd(limit)}, which nothing may exceed")
        total += limit
    return NanoUSD(total)


async def _enqueue(show: Show, stage: Stage, screen: Screen) -> Sequence[JobHandle]:
    began = time.monotonic()
    handles = await stage.client.enqueue_many(
        JobRequest(
            task.endpoint,
            task.body,
            tenant=task.tenant,
            lane=task.lane,
            idempotency_key=f"demo-{number}",
            webhook=stage.receivers[task.tenant].url,
            metadata={"kind": task.kind},
        )
        for number, task in enumerate(show.work)
    )
    screen.event(f"{len(handles):,} jobs accepted and durable in {time.monotonic() - began:.2f} s")
    return handles


async def _disturb(
    show: Show, stage: Stage, observer: Observer, screen: Screen
) -> tuple[Outage | None, Crash | None]:
    """Do to the run what is planned, and wait for its end."""
    total = len(show.work)
    outage, crash = None, None
    if show.simulated is not None:
        await observer.until(lambda: observer.now.ended >= total // 4)
        outage = await cause_outage(show.simulated, observer, screen)
    if show.crash:
        await observer.until(lambda: observer.now.ended >= total // 3)
        crash = await kill_a_worker(stage, observer, screen, wanted=max(1, show.plan.slots * 2 // 3))
    await observer.until(lambda: observer.now.ended >= total)
    return outage, crash


async def _until_called_back(stage: Stage, jobs: int, screen: Screen) -> None:
    def missing() -> int:
        return jobs - len(callbacks_of(stage.receivers).jobs)

    def explain() -> None:
        screen.event(
            f"{missing()} callbacks are in a dead worker's hands: another sends them after their lease"
        )

    await _wait(lambda: missing() == 0, _CALLBACK_SECONDS, explain)


async def _until_nothing_is_held(observer: Observer, screen: Screen) -> None:
    async def none_held() -> bool:
        await observer.look()
        return observer.held == 0

    def explain() -> None:
        screen.event(f"{format_usd(observer.held)} is held by a dead worker: it is given back after a minute")

    await _wait(none_held, _HOLD_SECONDS, explain)


async def _wait(
    condition: Callable[[], bool] | Callable[[], Awaitable[bool]], seconds: float, explain: Callable[[], None]
) -> None:
    """Wait until a condition holds, for some time at most; explain a wait that is noticed."""
    began = time.monotonic()
    explained = False
    while (waited := time.monotonic() - began) < seconds:
        held = condition()
        if held if isinstance(held, bool) else await held:
            return
        if waited > _NOTICED_SECONDS and not explained:
            explain()
            explained = True
        await asyncio.sleep(_POLL_SECONDS)
