"""Hold the most that the call can cost, over all scopes of the job, or let it wait."""

import asyncio
import contextlib
from collections.abc import Sequence
from datetime import timedelta
from urllib.parse import quote

from headrace_shared.batching import Batcher
from headrace_shared.budgets import Budgets, Held, HoldRequest, Settlement
from headrace_shared.dispatch.dispatch import Dispatch, Gate, GateReason
from headrace_shared.errors import DispatchUnavailable, UnknownPrice
from headrace_shared.ids import RouteName, hold_id
from headrace_shared.money import ZERO, NanoUSD, format_usd
from headrace_shared.outcome import ErrorClass, Failed, Failure, Snoozed, WaitReason
from headrace_shared.scopes import gate_dimension, scopes_of
from headrace_shared.store.money import BudgetPolicy, Refused
from headrace_shared.store.pool import UNREACHABLE
from headrace_workers.alerts import Refusals
from headrace_workers.execution import Run
from headrace_workers.steps.downgrade import Downgrade
from headrace_workers.turns import Turns

PAUSE = timedelta(milliseconds=500)
"""How long a queue waits for other calls to release money before it is tried again."""

SERVER_PAUSE = timedelta(seconds=2)
"""How long a job waits for servers that are away before it is tried again."""


class Hold:
    def __init__(
        self, budgets: Budgets, dispatch: Dispatch, downgrade: Downgrade, refusals: Refusals | None = None
    ) -> None:
        self._budgets = budgets
        self._refusals = refusals
        self._dispatch = dispatch
        self._downgrade = downgrade
        self._turns = Turns(PAUSE)
        self._holds = Batcher[HoldRequest, Held | Refused](self._hold, max_size=1000, unclaimed=self._release)
        self._releasing: set[asyncio.Task[None]] = set()

    async def __call__(self, run: Run) -> Run:
        if run.price is None or run.request is None or run.ask is None:
            return run
        try:
            request = run.request
            amount = run.price.worst_case(request.input_bound, request.output_bound, request.hosted)
            return await self._fit(run, run.ask.route, amount)
        except UnknownPrice as error:
            return run.ended(Failed(Failure(ErrorClass.UNKNOWN_PRICE, error.message)))
        except (DispatchUnavailable, *UNREACHABLE):
            return run.ended(Snoozed(SERVER_PAUSE, WaitReason.SERVERS))

    async def _fit(self, run: Run, route: RouteName, amount: NanoUSD) -> Run:
        """Hold for the call or, where a budget says so, for one that another target answers."""
        held = await self._try(run, route, amount)
        if not isinstance(held, Refused):
            return held
        refused, least = held, amount
        if held.policy is BudgetPolicy.DOWNGRADE:
            for other, most in self._downgrade.cheaper(run, amount):
                tried = await self._try(other, route, most)
                if not isinstance(tried, Refused):
                    self._downgrade.taken(run, tried)
                    return tried
                if most < least:
                    refused, least = tried, most
        return await self._refused(run, refused, least)

    async def _try(self, run: Run, route: RouteName, amount: NanoUSD) -> Run | Refused:
        allowance = run.job.allowance
        missing = allowance.hold(amount) if allowance else ZERO
        if allowance and missing:
            if missing <= allowance.held:
                return run.ended(Snoozed(PAUSE, WaitReason.BUDGET))
            return run.ended(_exhausted("what this job may cost", missing, amount))
        request = HoldRequest(hold_id(run.job.id, run.job.run, run.call), amount, scopes_of(run.job, route))
        kept = False
        try:
            held = await self._holds.submit(request)
            kept = isinstance(held, Held)
        finally:
            if allowance and not kept:
                allowance.settle(amount, ZERO)
        return run._replace(held=held) if isinstance(held, Held) else held

    async def _hold(self, requests: Sequence[HoldRequest]) -> Sequence[Held | Refused]:
        return await self._budgets.hold(requests)

    def _release(self, request: HoldRequest, held: Held | Refused) -> None:
        """Give back at once what was held for a run that was interrupted meanwhile."""
        if isinstance(held, Held):
            task = asyncio.create_task(self._give_back(request), name="give-back")
            self._releasing.add(task)
            task.add_done_callback(self._releasing.discard)

    async def _give_back(self, request: HoldRequest) -> None:
        with contextlib.suppress(DispatchUnavailable, *UNREACHABLE):  # it is found by its age
            await self._budgets.settle([Settlement(request.id, ZERO)])

    async def _refused(self, run: Run, refused: Refused, amount: NanoUSD) -> Run:
        """Wait while calls under way may release money; then for the window; or give up."""
        if refused.missing <= refused.held_by_others:
            await self._close_gate(refused, PAUSE)
            return run.ended(Snoozed(self._turns.take(refused.scope), WaitReason.BUDGET))
        if self._refusals is not None:
            await self._refusals.note(refused)
        waits = refused.policy in (BudgetPolicy.WAIT, BudgetPolicy.DOWNGRADE)
        if waits and refused.ends_in is not None and amount <= refused.limit:
            # Where there is room, or will be when other calls have ended, a smaller job may still go.
            if refused.missing >= amount:
                is_spent = refused.missing - refused.held_by_others >= amount
                await self._close_gate(refused, refused.ends_in if is_spent else PAUSE)
            put_back = run.ended(Snoozed(refused.ends_in, WaitReason.BUDGET))
            return put_back._replace(refused_under=refused.epoch)
        return run.ended(_exhausted(f"the {refused.kind} budget of {refused.scope}", refused.missing, amount))

    async def _close_gate(self, refused: Refused, duration: timedelta) -> None:
        """Close the gate of the queues that spend from a scope; others' jobs only go back."""
        found = gate_dimension(refused.scope)
        if found is None or not self._turns.is_news(f"{refused.scope} {duration > PAUSE}"):
            return
        kind, name = found
        dimension = f"{kind}:{quote(name, safe='')}" if name else kind
        with contextlib.suppress(DispatchUnavailable):
            await self._dispatch.close_gate(Gate(dimension, GateReason.BUDGET), duration, epoch=refused.epoch)


def _exhausted(what: str, missing: NanoUSD, amount: NanoUSD) -> Failed:
    sentence = f"{what} lacks {format_usd(missing)} of the {format_usd(amount)} that this call can cost"
    if missing > amount:
        over = format_usd(NanoUSD(missing - amount))
        sentence = f"{what} is over its limit by {over}, and this call can cost {format_usd(amount)}"
    return Failed(Failure(ErrorClass.BUDGET_EXHAUSTED, sentence))
