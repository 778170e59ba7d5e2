"""The request goes out."""

from dataclasses import replace
from datetime import timedelta

from headrace_shared.errors import MissingSetting
from headrace_shared.outcome import ErrorClass, Failure
from headrace_workers.breaker import Breakers
from headrace_workers.clients import Clients
from headrace_workers.execution import Run
from headrace_workers.replies import Refused, Reply


class Call:
    def __init__(self, clients: Clients, breakers: Breakers) -> None:
        self._clients = clients
        self._breakers = breakers

    async def __call__(self, run: Run) -> Run:
        if run.target is None or run.permit is None or run.request is None:
            return run
        target, request = run.target, run.request

        async def send() -> Reply:
            try:
                client = self._clients.of(target.provider)
            except MissingSetting as error:
                return Refused(timedelta(0), Failure(ErrorClass.AUTH, error.message))
            return await client.call(run.job.endpoint, request.body)

        reply = await self._breakers.of(target).call(run.permit, send)
        return replace(run, sent=True, reply=reply)
