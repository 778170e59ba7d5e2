"""The request goes out."""

from datetime import timedelta
from http import HTTPStatus

from headrace_shared.errors import InvalidConfiguration
from headrace_shared.outcome import ErrorClass, Failure
from headrace_shared.telemetry import CallSpan, call_span
from headrace_shared.usage import NO_USAGE, Finish
from headrace_workers.breaker import Breakers
from headrace_workers.clients import Clients
from headrace_workers.execution import Run, Sends
from headrace_workers.replies import Answered, Refused, Reply, Unknown


class Call(Sends):
    def __init__(self, clients: Clients, breakers: Breakers) -> None:
        self._clients = clients
        self._breakers = breakers

    async def __call__(self, run: Run) -> Run:
        if run.ask is None or run.target is None or run.permit is None or run.request is None:
            return run
        if run.last_resort is not None:
            return run._replace(sent=True, reply=_given(run.last_resort))
        target, endpoint, request = run.target, run.ask.endpoint, run.request

        async def send() -> Reply:
            try:
                client = self._clients.of(target.provider)
            except InvalidConfiguration as error:
                return Refused(timedelta(0), Failure(ErrorClass.AUTH, error.message))
            return await client.call(endpoint, request.body, run.timeouts)

        with call_span(target, endpoint) as span:
            reply = await self._breakers.of(target).call(run.permit, send)
            _describe(reply, span)
        return run._replace(sent=True, reply=reply)


def _given(answer: bytes) -> Answered:
    return Answered(timedelta(0), HTTPStatus.OK, None, answer, NO_USAGE, Finish.COMPLETE)


def _describe(reply: Reply, span: CallSpan) -> None:
    match reply:
        case Answered(usage=usage, finish=finish, request_id=request_id):
            span.answered(usage, finish, request_id=request_id)
        case Refused(failure=failure, status=status) | Unknown(failure=failure, status=status):
            span.failed(failure.error_class, status=status)
