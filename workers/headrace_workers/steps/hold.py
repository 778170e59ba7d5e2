"""Hold the most that the call can cost, over all scopes of the job, or let it wait."""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from urllib.parse import quote

from headrace_shared.batching import Batcher
from headrace_shared.budgets import Budgets, Held, HoldRequest, scopes_of
from headrace_shared.dispatch.dispatch import Dispatch, Gate
from headrace_shared.errors import DispatchUnavailable, UnknownPrice
from headrace_shared.ids import hold_id
from headrace_shared.money import NanoUSD, format_usd
from headrace_shared.outcome import ErrorClass, Failed, Failure, Snoozed, WaitReason
from headrace_shared.prices import Price
from headrace_shared.request import PreparedRequest
from headrace_shared.store.money import BudgetPolicy, Refused
from headrace_shared.store.pool import UNREACHABLE
from headrace_workers.alerts import Refusals
from headrace_workers.execution import Run

PAUSE = timedelta(milliseconds=500)
"""How long a queue waits for other calls to release money before it is tried again."""

SERVER_PAUSE = timedelta(seconds=2)
"""How long a job waits for servers that are away before it is tried again."""


class Hold:
    def __init__(self, budgets: Budgets, dispatch: Dispatch, refusals: Refusals | None = None) -> None:
        self._budgets = budgets
        self._refusals = refusals
        self._dispatch = dispatch
        self._holds = Batcher[HoldRequest, Held | Refused](self._hold, max_size=1000)

    async def __call__(self, run: Run) -> Run:
        if run.price is None or run.request is None:
            return run
        try:
            return await self._held(run, run.price, run.request)
        except UnknownPrice as error:
            return run.ended(Failed(Failure(ErrorClass.UNKNOWN_PRICE, error.message)))
        except (DispatchUnavailable, *UNREACHABLE):
            return run.ended(Snoozed(SERVER_PAUSE, WaitReason.SERVERS))

    async def _held(self, run: Run, price: Price, request: PreparedRequest) -> Run:
        amount = price.worst_case(request.input_bound, request.output_bound)
        held = await self._holds.submit(
            HoldRequest(hold_id(run.job.id, run.job.run, run.call), amount, scopes_of(run.job.queue.tenant))
        )
        match held:
            case Held():
                return replace(run, held=held)
            case Refused():
                return await self._refused(run, held, amount)

    async def _hold(self, requests: Sequence[HoldRequest]) -> Sequence[Held | Refused]:
        return await self._budgets.hold(requests)

    async def _refused(self, run: Run, refused: Refused, amount: NanoUSD) -> Run:
        """Wait while calls under way may release money; then for the window; or give up."""
        if refused.missing <= refused.held_by_others:
            await self._close_gate(refused, PAUSE)
            return run.ended(Snoozed(PAUSE, WaitReason.BUDGET))
        if self._refusals is not None:
            await self._refusals.note(refused)
        if refused.policy is BudgetPolicy.WAIT and refused.ends_in is not None and amount <= refused.limit:
            # Where some room is left a smaller job may still go.
            if refused.missing >= amount:
                await self._close_gate(refused, refused.ends_in)
            return run.ended(Snoozed(refused.ends_in, WaitReason.BUDGET))
        return run.ended(Failed(Failure(ErrorClass.BUDGET_EXHAUSTED, _sentence(refused, amount))))

    async def _close_gate(self, refused: Refused, duration: timedelta) -> None:
        kind, _, name = refused.scope.partition(":")
        dimension = f"{kind}:{quote(name, safe='')}" if name else kind
        with contextlib.suppress(DispatchUnavailable):
            await self._dispatch.close_gate(Gate(dimension, "budget"), duration)


def _sentence(refused: Refused, amount: NanoUSD) -> str:
    return (
        f"the {refused.kind} budget of {refused.scope} lacks {format_usd(refused.missing)} "
        f"of the {format_usd(amount)} that this call can cost"
    )
