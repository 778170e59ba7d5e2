"""A file becomes a batch: checked and quoted, enqueued, waited for; the same content only once."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from headrace_producer.batch.expecting import Quote
from headrace_producer.batch.files import BatchFile
from headrace_producer.batch.following import Standing, follow, standing
from headrace_producer.batch.lines import Format
from headrace_producer.batch.progress import View, facts_of
from headrace_producer.batch.quote import Seen, nothing_seen
from headrace_producer.batch.saving import Line, LineSaver, Purpose, read_chunks
from headrace_producer.batch.survey import Survey, survey_file
from headrace_producer.connections import Connections
from headrace_producer.console import count, dollars
from headrace_producer.in_force import InForce, Snapshot
from headrace_producer.timing import AT_ONCE, Timing, check_ahead
from headrace_shared.budgets import Budgets
from headrace_shared.configuration import Configuration
from headrace_shared.errors import InvalidInput, InvalidRequest, StoreUnavailable
from headrace_shared.ids import BatchId, Tenant
from headrace_shared.money import NanoUSD, format_usd, to_usd
from headrace_shared.scopes import batch_scope
from headrace_shared.settings import Settings
from headrace_shared.store import batches, lengths
from headrace_shared.store.money import BudgetPolicy, WindowKind, has_budget
from headrace_shared.store.pool import UNREACHABLE
from headrace_shared.webhooks import check_url

_EVERY_LINE: frozenset[int] = frozenset()
_OUTAGE_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Submission:
    """What is to be done with a file."""

    path: Path
    form: Format
    tenant: Tenant
    lane: str = "batch"
    webhook: str | None = None
    timing: Timing = AT_ONCE
    """How long each of its jobs may take."""
    max_cost: NanoUSD | None = None
    """The most that the batch may cost: a budget of its own, at which it stops."""
    tags: tuple[str, ...] = ()
    sample: int = 0
    """Requests to run, chosen at random; 0 is all of them."""
    again: bool = False
    """Make a new batch where the content was submitted before."""
    wait: bool = False


@dataclass(frozen=True, slots=True)
class Submitted:
    """How a batch stands when its submission returns."""

    batch_id: BatchId
    created: bool
    total: int
    enqueued: int
    """By this submission; what was there before is not in it."""
    standing: Standing
    quote: Quote | None
    """None: the batch was enqueued before, and was not read again."""

    @property
    def finished(self) -> bool:
        return self.standing.progress.ended >= self.total


class Interrupted(Exception):
    """The caller was interrupted; what is enqueued goes on."""

    def __init__(self, batch_id: BatchId, *, complete: bool) -> None:
        super().__init__(str(batch_id))
        self.batch_id = batch_id
        self.complete = complete


async def quote_file(submission: Submission, snapshot: Snapshot, seen: Seen = nothing_seen) -> Quote:
    """Check a file and say what it would cost; nothing is enqueued.

    Raises:
        InvalidBatchFile: with every bad line.
        InvalidInput: an option.

    """
    check_options(submission, snapshot.configuration)
    with BatchFile(submission.path) as file:
        return (await survey_file(file, submission.form, snapshot, seen=seen)).quote


class Submitter:
    """Submits files through one pair of servers."""

    def __init__(self, connections: Connections, view: View) -> None:
        self._connections = connections
        self._in_force = InForce(connections.pool)
        self._view = view

    async def submit(self, submission: Submission) -> Submitted:
        """Enqueue what is not enqueued yet, and wait for it if that was asked for.

        Raises:
            InvalidBatchFile: with every bad line; nothing was enqueued.
            InvalidInput: the file, an option, or what it could cost; nothing was enqueued.
            Interrupted: by a cancellation, after something was enqueued.

        """
        with BatchFile(submission.path) as file:
            digest = file.digest(*submission.form.settings)
            known = await self._find(submission, digest)
            if known is not None:
                submission = await self._tagged(submission, known.batch.id)
            if known is not None and known.enqueued >= known.batch.total:
                await self._check_limited(submission, known.batch.id)
                opened = batches.OpenedBatch(known.batch.id, created=False)
                return await self._finish(submission, opened, known.batch.total, 0, None)
            survey = await self._survey(submission, file, digest)
            opened = await batches.open_batch(
                self._connections.pool,
                submission.tenant,
                digest,
                name=file.name,
                total=survey.total,
                again=submission.again,
            )
            await self._limit(submission, opened, survey.quote)
            try:
                enqueued = await self._enqueue(submission, file, opened.id, survey)
            except asyncio.CancelledError:
                raise Interrupted(opened.id, complete=False) from None
        return await self._finish(submission, opened, survey.total, enqueued, survey.quote)

    async def _find(self, submission: Submission, digest: bytes) -> "_Known | None":
        if submission.again:
            return None
        pool = self._connections.pool
        batch = await batches.find_batch(pool, submission.tenant, digest)
        if batch is None:
            return None
        known = _Known(batch, (await batches.batch_progress(pool, batch.id)).enqueued)
        retention = (await self._in_force.now()).configuration.defaults.retention
        if known.enqueued < batch.total and batch.created_at + retention < datetime.now(UTC):
            raise InvalidInput(
                reason=f"{submission.path} was submitted on {batch.created_at:%Y-%m-%d}, and its results "
                "are no longer kept: --again makes a new batch of it."
            )
        return known

    async def _tagged(self, submission: Submission, batch_id: BatchId) -> Submission:
        """Give the rest of a batch the tags that it has, for spend counts under those; refuse others."""
        tags = await batches.batch_tags(self._connections.pool, batch_id)
        if tags is None:
            return submission
        if submission.tags and submission.tags != tags:
            under = f"with {', '.join(f'--tag {tag}' for tag in tags)}" if tags else "without --tag"
            raise InvalidInput(
                reason=f"{submission.path} is enqueued already, {under}: the same command as then goes on "
                "with it, --again makes a new batch."
            )
        return replace(submission, tags=tags)

    async def _check_limited(self, submission: Submission, batch_id: BatchId) -> None:
        """Refuse a limit that would come too late: the batch is enqueued, and has none."""
        scope = batch_scope(batch_id)
        if submission.max_cost is None or await has_budget(self._connections.pool, scope):
            return
        raise InvalidInput(
            reason=f"{submission.path} is enqueued already, without --max-cost: "
            f"'headrace budgets set {scope} --limit {to_usd(submission.max_cost):f}' "
            "limits what is left of it, --again makes a new batch."
        )

    async def _survey(self, submission: Submission, file: BatchFile, digest: bytes) -> Survey:
        snapshot = await self._in_force.now()
        check_options(submission, snapshot.configuration)
        check_webhook(submission, self._connections.settings)
        self._view.begin("Checking")
        survey = await survey_file(
            file,
            submission.form,
            snapshot,
            seen=partial(lengths.learnt, self._connections.pool),
            sample=submission.sample,
            seed=digest,
        )
        check_cost(submission, survey.quote)
        if submission.sample > survey.total:
            self._view.tell(
                f"{submission.path} has only {count(survey.total, 'request')}: --sample {submission.sample} "
                "takes all of them."
            )
        return survey

    async def _limit(self, submission: Submission, opened: batches.OpenedBatch, quote: Quote) -> None:
        """Give the batch a budget of its own, before any of its jobs can be seen."""
        limit, budgets = submission.max_cost, Budgets(self._connections.pool, self._connections.redis)
        scope = batch_scope(opened.id)
        if limit is None:
            # A submission that was broken off may not have come to tell anybody of the one it set.
            if not opened.created and await has_budget(self._connections.pool, scope):
                await budgets.take_effect(scope)
            return
        if quote.most > limit:
            self._view.tell(
                f"It could cost up to {dollars(quote.most)}: what would go over {dollars(limit)} is not run."
            )
        if opened.created:
            await budgets.begin(scope, limit)
        else:
            await budgets.set(scope, WindowKind.TOTAL, limit, BudgetPolicy.WAIT)

    async def _enqueue(
        self, submission: Submission, file: BatchFile, batch_id: BatchId, survey: Survey
    ) -> int:
        purpose = Purpose(
            batch_id,
            submission.tenant,
            submission.lane,
            submission.webhook,
            submission.timing,
            submission.tags,
        )
        saver = LineSaver(self._connections, self._in_force, purpose)
        chosen = survey.sample if submission.sample else _EVERY_LINE
        total = len(chosen) or survey.total
        done = enqueued = 0
        for chunk in read_chunks(file, submission.form, await self._in_force.now(), chosen):
            enqueued += await self._save(saver, chunk)
            done += len(chunk)
            self._view.show("Enqueued", done, total)
        return enqueued

    async def _save(self, saver: LineSaver, chunk: Sequence[Line]) -> int:
        """Save a chunk; a store that is away is waited for, because it is safe to try again."""
        for attempt in range(_OUTAGE_SECONDS):
            try:
                return await saver.save(chunk)
            except UNREACHABLE as error:
                if not attempt:
                    self._view.tell(f"PostgreSQL is away ({type(error).__name__}): waiting for it.")
                await asyncio.sleep(1)
        reason = f"not for {_OUTAGE_SECONDS} s; the same command goes on from here"
        raise StoreUnavailable(address=self._connections.address, reason=reason)

    async def _finish(
        self,
        submission: Submission,
        opened: batches.OpenedBatch,
        total: int,
        enqueued: int,
        quote: Quote | None,
    ) -> Submitted:
        try:
            now = await standing(self._connections, opened.id, total)
            if submission.wait or submission.sample:
                target = now.progress.enqueued if submission.sample else total
                now = await self._wait(opened.id, target, now)
        except asyncio.CancelledError:
            raise Interrupted(opened.id, complete=not submission.sample) from None
        return Submitted(opened.id, opened.created, total, enqueued, now, quote)

    async def _wait(self, batch_id: BatchId, target: int, before: Standing) -> Standing:
        now = before
        if now.progress.ended >= target:
            return now
        async for now in follow(self._connections, batch_id, target, self._view.tell):
            self._view.show("Done", now.progress.ended, target, facts_of(now))
        return now


@dataclass(frozen=True, slots=True)
class _Known:
    batch: batches.Batch
    enqueued: int


def check_options(submission: Submission, configuration: Configuration) -> None:
    """Refuse what no job of the file could have.

    Raises:
        InvalidRequest: names the option.

    """
    check_ahead("deadline", submission.timing.deadline)
    if submission.lane not in configuration.lanes:
        known = ", ".join(configuration.lanes)
        raise InvalidRequest(field="lane", reason=f"{submission.lane!r} is not one of {known}")


def check_webhook(submission: Submission, settings: Settings) -> None:
    """Refuse a callback to where these settings allow none.

    Raises:
        InvalidWebhook: says what is wrong with it.

    """
    if submission.webhook is not None:
        check_url(
            submission.webhook,
            allow_http=settings.webhook_allow_http,
            allowed_networks=settings.webhook_allowed_networks,
        )


def check_cost(submission: Submission, quote: Quote) -> None:
    """Refuse a file with a request that does not fit under its ceiling, whatever the others cost.

    Raises:
        InvalidInput: there is one; the sentence has the figures.

    """
    if submission.max_cost is not None and quote.dearest > submission.max_cost:
        raise InvalidInput(
            reason=f"One request of {submission.path} could cost up to {dollars(quote.dearest)} by itself "
            f"(all {quote.requests:,} up to {dollars(quote.most)}), which is more than --max-cost "
            f"{format_usd(submission.max_cost)}: nothing was enqueued."
        )
