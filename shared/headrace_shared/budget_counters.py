"""What the counters of budgets look like in Redis: written there as the ledger has them, and read."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import cast

from headrace_shared.dispatch.connection import Argument
from headrace_shared.holds import Held, HoldRequest
from headrace_shared.money import NanoUSD
from headrace_shared.store.money import BudgetPolicy, Counters, Refused, WindowKind

FORMAT = "2"
"""Of the counters. Those of another format leave out what this version counts: they are put in place anew."""


def settings_of(read: Counters) -> dict[str, Argument]:
    """Return what stands under `headrace:money`: windows, limits, policies."""
    found: dict[str, Argument] = {"format": FORMAT}
    for window in read.windows:
        found[f"window|{window.kind}"] = window.name
        if window.ends_in is not None:
            # Rounded up: a window must not turn here before it does in the store.
            found[f"ends_in|{window.kind}"] = math.ceil(window.ends_in * 1000)
    for state in read.budgets:
        found[f"limit|{state.scope}|{state.kind}"] = state.limit
        found[f"policy|{state.scope}|{state.kind}"] = state.policy
    return found


def counters_of(read: Counters) -> tuple[dict[str, int], dict[str, str]]:
    """Return what stands under `headrace:spent`, and under `headrace:holds`."""
    counters: dict[str, int] = {}
    names = {f"{state.scope}|{state.window}" for state in read.budgets}
    for state in read.budgets:
        counters[f"{state.scope}|{state.window}|settled"] = state.settled
        counters[f"{state.scope}|{state.window}|suspense"] = state.suspense
    records: dict[str, str] = {}
    for hold in read.holds:
        counted = [f"{scope}|{window}" for scope in hold.scopes for window in hold.windows]
        counted = [name for name in counted if name in names]
        for name in counted:
            counters[f"{name}|held"] = counters.get(f"{name}|held", 0) + hold.amount
        if counted:
            records[hold.id] = "\n".join([str(hold.amount), *counted])
    return counters, records


def read_answer(request: HoldRequest, answer: Sequence[int | bytes], epoch: int) -> Held | Refused:
    """Read what the script says of one hold."""
    if answer[0] == 1:
        at = datetime.fromtimestamp(int(answer[1]) / 1000, UTC)
        return Held(request.id, request.amount, epoch, at)
    _, scope, kind, limit, missing, held, ends_in, policy = answer
    return Refused(
        cast("bytes", scope).decode(),
        WindowKind(cast("bytes", kind).decode()),
        NanoUSD(int(limit)),
        NanoUSD(int(missing)),
        NanoUSD(int(held)),
        timedelta(milliseconds=int(ends_in)) if int(ends_in) >= 0 else None,
        BudgetPolicy(cast("bytes", policy).decode()),
        epoch,
    )


def read_whole(text: str | None) -> int:
    """Read a counter for somebody to look at; the next hold or settlement repairs what is none."""
    return int(text) if text is not None and text.removeprefix("-").isdecimal() else 0
