"""A worker process, put together: what it opens, what it runs, how it stops."""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager
from datetime import timedelta

from headrace_shared.configuration import Configuration
from headrace_shared.errors import InvalidConfiguration, MissingSetting
from headrace_shared.ids import WorkerId, uuid7
from headrace_shared.settings import Settings
from headrace_shared.store import feed
from headrace_shared.store.pool import UNREACHABLE
from headrace_workers.alerts import INTERVAL as ALERTS_INTERVAL
from headrace_workers.alerts import BudgetAlerts
from headrace_workers.claiming import Claiming
from headrace_workers.feeder import Feeder
from headrace_workers.gauges import Gauges
from headrace_workers.heartbeat import Heartbeat
from headrace_workers.leadership import Leadership
from headrace_workers.parts import Parts, execution_of, open_parts
from headrace_workers.probes import Probes
from headrace_workers.reach import Reach
from headrace_workers.reaper import Reaper
from headrace_workers.running import Running
from headrace_workers.suspects import Suspects
from headrace_workers.watchdog import Watchdog
from headrace_workers.webhooks.deliverer import Deliverer
from headrace_workers.webhooks.sender import Sender
from headrace_workers.worker import Worker

_logger = logging.getLogger(__name__)


@asynccontextmanager
async def open_worker(
    settings: Settings, *, burst: bool = False, handle_signals: bool = True
) -> AsyncGenerator[Worker]:
    """Put a worker together with its side services; `await worker.main()` runs it."""
    worker_id = WorkerId(f"{socket.gethostname()}-{os.getpid()}-{uuid7().hex[-6:]}")
    async with open_parts(settings, worker_id) as parts:
        _check_lanes(settings, parts.configured.now.configuration)
        reaper = Reaper(
            parts.pool, parts.dispatch, parts.budgets, parts.breakers, parts.configured, lease=settings.lease
        )
        reach = Reach(parts.pool, parts.redis, parts.budgets, worker_id)
        running = Running(parts.running, execution_of(parts), parts.telemetry.metrics)
        suspects = Suspects(parts.pool, parts.dispatch, parts.budgets, settings, worker_id)
        worker = Worker(
            redis_url=settings.require_redis(),
            worker_id=worker_id,
            slots=settings.concurrency,
            lease=settings.lease,
            drain=settings.drain,
            reach=reach,
            claiming=_claiming(settings, parts, worker_id, running, suspects),
            running=running,
            suspects=suspects,
            burst=burst,
            handle_signals=handle_signals,
        )
        ready = _Readiness(worker)
        probes = Probes(settings, ready, parts.telemetry.registry)
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(worker.close)
            await stack.enter_async_context(probes)
            await stack.enter_async_context(_services(settings, parts, worker, reaper, reach))
            ready.started = True
            yield worker


def _check_lanes(settings: Settings, configuration: Configuration) -> None:
    unknown = [lane for lane in settings.served_lanes if lane not in configuration.lanes]
    if unknown:
        reason = f"there is no such lane, only {', '.join(configuration.lanes)}"
        raise InvalidConfiguration(where=f"lanes: {unknown[0]}", reason=reason)


def _claiming(
    settings: Settings, parts: Parts, worker_id: WorkerId, running: Running, suspects: Suspects
) -> Claiming:
    return Claiming(
        parts.pool,
        parts.dispatch,
        parts.configured,
        parts.telemetry.metrics,
        worker=worker_id,
        lanes=settings.served_lanes or None,
        lease=settings.lease,
        running=running,
        suspects=suspects,
        handlers=parts.handlers,
    )


class _Readiness:
    """Why a worker takes no jobs; None when it does."""

    def __init__(self, worker: Worker) -> None:
        self.started = False
        self._worker = worker

    def __call__(self) -> str | None:
        if self._worker.draining:
            return "draining"
        return None if self.started else "starting"


@asynccontextmanager
async def _services(
    settings: Settings, parts: Parts, worker: Worker, reaper: Reaper, reach: Reach
) -> AsyncGenerator[None]:
    """Run what a worker does beside its jobs. A service that dies takes the worker with it."""
    heartbeat = Heartbeat(
        parts.pool,
        parts.dispatch,
        worker.worker_id,
        shortest_lease=worker.claiming.shortest_lease,
        running=parts.running,
        interrupt=worker.running.interrupt,
        introduce=lambda: (socket.gethostname(), settings.concurrency, tuple(worker.claiming.lanes())),
        follow=worker.claiming.follow,
        leases=parts.leases,
    )
    await heartbeat.beat()
    stop = asyncio.Event()
    services = [
        asyncio.create_task(service, name=name)
        for name, service in [
            ("deliverer", _deliverer(settings, parts, worker).run(stop)),
            ("heartbeat", heartbeat.run()),
            ("reach", reach.run()),
            *_side_services(settings, parts, worker, reaper),
        ]
    ]
    for service in services:
        service.add_done_callback(lambda task: _watch(task, worker))
    watchdog = Watchdog(
        asyncio.get_running_loop(), worker.claiming.shortest_lease, parts.telemetry.metrics.loop_stalled
    )
    try:
        with watchdog.watching():
            yield
    finally:
        await parts.finisher.drain()
        await parts.limiter.drain()
        stop.set()
        await asyncio.wait(services[:1], timeout=settings.drain_seconds + 5)
        for service in services:
            service.cancel()
        await asyncio.gather(*services, return_exceptions=True)
        with contextlib.suppress(*UNREACHABLE):
            await feed.forget_worker(parts.pool, worker.worker_id)


def _side_services(
    settings: Settings, parts: Parts, worker: Worker, reaper: Reaper
) -> list[tuple[str, Coroutine[object, object, None]]]:
    listen_url = settings.listen_url or (None if settings.pooler else settings.postgres_url)
    feeder = Feeder(
        parts.pool,
        parts.dispatch,
        listen_url=listen_url,
        longest_lease=lambda: max([settings.lease, *parts.configured.now.configuration.leases.values()]),
    )
    # A dead leader's role must not keep its jobs waiting for longer than their leases do.
    term = max(settings.lease, timedelta(seconds=2))
    feeding = Leadership(
        parts.pool, worker.worker_id, "feeder", term=term, turn=feeder.turn, wake=feeder.wake
    )
    reaping = Leadership(parts.pool, worker.worker_id, "reaper", term=term, turn=reaper.turn, wake=_rest)
    budget_alerts = BudgetAlerts(parts.pool, parts.configured, parts.telemetry.metrics)
    alerting = Leadership(
        parts.pool,
        worker.worker_id,
        "alerts",
        term=max(term, 3 * ALERTS_INTERVAL),
        turn=budget_alerts.turn,
        wake=_rest,
        campaign=ALERTS_INTERVAL,
    )
    return [
        ("alerts", alerting.run()),
        ("breakers", parts.breakers.run()),
        ("limits", parts.limiter.run()),
        *_metering(settings, parts),
        ("listener", feeder.listen()),
        ("feeder", feeding.run()),
        ("lengths", parts.lengths.run()),
        ("reaper", reaping.run()),
    ]


def _metering(settings: Settings, parts: Parts) -> list[tuple[str, Coroutine[object, object, None]]]:
    if settings.metrics_port is None:
        return []
    metrics = parts.telemetry.metrics
    gauges = Gauges(metrics, parts.pool, parts.budgets, parts.breakers, parts.running)
    return [("gauges", gauges.run()), ("event-loop", metrics.watch_event_loop())]


def _deliverer(settings: Settings, parts: Parts, worker: Worker) -> Deliverer:
    policy = parts.configured.now.configuration.webhook_policy()
    masters: list[bytes] = []
    for reference in (policy.secret, policy.previous_secret):
        with contextlib.suppress(MissingSetting):
            if reference is not None:
                masters.append(reference.resolve().reveal().encode())
    sender = None
    if masters:
        sender = Sender(
            tuple(masters),
            timeout=policy.timeout,
            allow_http=settings.webhook_allow_http,
            allowed_networks=settings.webhook_allowed_networks,
        )
    return Deliverer(
        parts.pool,
        sender,
        policy,
        doorbell=worker.running.callback_bell,
        metrics=parts.telemetry.metrics,
        margin=settings.lease,
    )


async def _rest(delay: timedelta) -> None:
    await asyncio.sleep(delay.total_seconds())


def _watch(task: asyncio.Task[None], worker: Worker) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _logger.error("%s died; the worker stops", task.get_name(), exc_info=error)
        worker.stop()
