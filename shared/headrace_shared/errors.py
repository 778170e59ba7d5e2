"""Everything Headrace raises, in one tree.

::

    HeadraceError
    ├── InvalidInput                what a caller handed in is wrong; nothing was changed
    │   ├── InvalidRequest          a job's endpoint, body, model or option
    │   │   └── BodyTooLarge
    │   ├── InvalidAmount
    │   ├── InvalidWebhook
    │   ├── InvalidConfiguration    headrace.toml, or the environment
    │   │   ├── InvalidHandler      a handler's module, name, parameters or result
    │   │   ├── MissingExtra        a package that an extra of headrace brings
    │   │   └── MissingSetting
    │   ├── UnknownPrice
    │   │   └── UnknownToolPrice    of a tool that the provider runs
    │   └── InvalidBatchFile        carries every bad line
    ├── CallFailed                  a handler's call came to no answer
    ├── ClientNotOpen
    ├── ConfigurationChanged        by somebody else, while a change to it was made
    ├── IdempotencyConflict         the key was used with another body
    ├── JobNotFound
    ├── NotRetriable                a job that has not ended, or has a result, has nothing to retry
    ├── AlreadyRetried              a newer job took its place
    ├── ResultTimeout               the job has not ended yet
    ├── JobFailed                   the job ended without a result
    │   ├── JobCancelled
    │   └── JobExpired
    ├── StoreError
    │   ├── StoreUnavailable
    │   ├── StoreTooOld             the server, or the schema, is older than this code needs
    │   └── StoreNotMigrated
    ├── DispatchError
    │   ├── DispatchUnavailable
    │   │   └── DispatchDamaged     what is in Redis under our names is not ours, and stays
    │   └── DispatchTooOld
    ├── EmbeddedServerFailed
    ├── WebhookRefused              a callback's target is not one that may be dialled
    └── WebhookVerificationFailed   a received callback is not one that was signed for its receiver

The first line of a class's docstring is its message; the names in braces are its
fields. Each message is one sentence that says what is wrong and what would be right.
"""

import inspect
from collections.abc import Sequence
from uuid import UUID


class HeadraceError(Exception):
    """Something went wrong in Headrace."""

    def __init__(self, **fields: object) -> None:
        self.__dict__.update(fields)
        template = (inspect.getdoc(type(self)) or "").split("\n\n", 1)[0].replace("\n", " ")
        super().__init__(template.format(**fields))

    @property
    def message(self) -> str:
        return str(self)


class InvalidInput(HeadraceError):
    """{reason}"""

    reason: str


class InvalidRequest(InvalidInput):
    """{field}: {reason}."""

    field: str

    def __init__(self, *, field: str, reason: str) -> None:
        super().__init__(field=field, reason=reason)


class BodyTooLarge(InvalidRequest):
    """{field}: {reason}."""

    def __init__(self, *, size: int, limit: int) -> None:
        super().__init__(
            field="body",
            reason=f"is {size:,} bytes, more than the {limit:,} that defaults.max_body_bytes allows",
        )


class InvalidAmount(InvalidInput):
    """{amount!r} is not an amount of dollars such as 5.00 (at most 9,000,000, nine decimal places)."""

    amount: str

    def __init__(self, *, amount: str) -> None:
        super().__init__(amount=amount)


class InvalidWebhook(InvalidInput):
    """webhook: {reason}."""

    def __init__(self, *, reason: str) -> None:
        super().__init__(reason=reason)


class InvalidConfiguration(InvalidInput):
    """{where}: {reason}."""

    where: str

    def __init__(self, *, where: str, reason: str) -> None:
        super().__init__(where=where, reason=reason)


class MissingSetting(InvalidConfiguration):
    """{where} is not set: {reason}."""


class InvalidHandler(InvalidConfiguration):
    """{where}: {reason}."""


class MissingExtra(InvalidConfiguration):
    """{where} need packages that are not installed: pip install "headrace[{extra}]"."""

    extra: str

    def __init__(self, *, feature: str, extra: str) -> None:
        HeadraceError.__init__(self, where=feature, extra=extra)


class UnknownPrice(InvalidInput):
    """No price is known for {target}: set input and output, in dollars per million tokens, under
    [prices."{target}"] in headrace.toml and run 'headrace config apply headrace.toml'.
    """

    target: str

    def __init__(self, *, target: str) -> None:
        super().__init__(target=target)


class UnknownToolPrice(UnknownPrice):
    """What {tool} comes to at {target} cannot be bounded: set {missing} under [prices."{target}"]
    in headrace.toml and run 'headrace config apply headrace.toml'.
    """

    tool: str

    def __init__(self, *, target: str, tool: str, missing: str) -> None:
        HeadraceError.__init__(self, target=target, tool=tool, missing=missing)


class InvalidBatchFile(InvalidInput):
    """{path}: {count} bad {noun}, nothing was enqueued."""

    path: str
    problems: Sequence[tuple[int, str]]
    """(line number from 1, what is wrong with it), in order."""

    def __init__(self, *, path: str, problems: Sequence[tuple[int, str]]) -> None:
        noun = "line" if len(problems) == 1 else "lines"
        super().__init__(path=path, problems=problems, count=len(problems), noun=noun)


class CallFailed(HeadraceError):
    """The call {name!r} failed ({error_class}): {error}"""

    name: str
    error_class: str
    error: str

    def __init__(self, *, name: str, error_class: str, error: str) -> None:
        super().__init__(name=name, error_class=error_class, error=error)


class ClientNotOpen(HeadraceError):
    """The client is not open: use it inside 'async with Headrace() as headrace:'."""


class ConfigurationChanged(HeadraceError):
    """The configuration was changed meanwhile (version {present} is in force, not {read}): run it again.

    Whoever changes a part of it names the version that was read, so that nobody's change is lost.
    """

    read: int
    present: int

    def __init__(self, *, read: int, present: int) -> None:
        super().__init__(read=read, present=present)


class IdempotencyConflict(HeadraceError):
    """The idempotency key {key!r} of tenant {tenant!r} belongs to job {job_id}, which has another body."""

    tenant: str
    key: str
    job_id: UUID

    def __init__(self, *, tenant: str, key: str, job_id: UUID) -> None:
        super().__init__(tenant=tenant, key=key, job_id=job_id)


class JobNotFound(HeadraceError):
    """There is no job {job_id}."""

    job_id: UUID

    def __init__(self, *, job_id: UUID) -> None:
        super().__init__(job_id=job_id)


class NotRetriable(HeadraceError):
    """Job {job_id} is {state}: only one that failed, expired or was cancelled can be retried."""

    job_id: UUID
    state: str

    def __init__(self, *, job_id: UUID, state: str) -> None:
        super().__init__(job_id=job_id, state=state)


class AlreadyRetried(HeadraceError):
    """Job {job_id} was retried already: job {replaced_by} took its place."""

    job_id: UUID
    replaced_by: UUID

    def __init__(self, *, job_id: UUID, replaced_by: UUID) -> None:
        super().__init__(job_id=job_id, replaced_by=replaced_by)


class ResultTimeout(HeadraceError):
    """Job {job_id} has not ended within {seconds:g} s: it is {state}{hint}."""

    job_id: UUID
    state: str
    hint: str

    def __init__(self, *, job_id: UUID, seconds: float, state: str, hint: str = "") -> None:
        super().__init__(job_id=job_id, seconds=seconds, state=state, hint=hint)


class JobFailed(HeadraceError):
    """Job {job_id} failed ({error_class}): {error}"""

    job_id: UUID
    error_class: str
    error: str

    def __init__(self, *, job_id: UUID, error_class: str, error: str) -> None:
        super().__init__(job_id=job_id, error_class=error_class, error=error)


class JobCancelled(JobFailed):
    """Job {job_id} was cancelled."""


class JobExpired(JobFailed):
    """Job {job_id} expired: {error}"""


class StoreError(HeadraceError):
    """{reason}"""


class StoreUnavailable(StoreError):
    """PostgreSQL at {address} cannot be reached ({reason})."""

    def __init__(self, *, address: str, reason: str) -> None:
        super().__init__(address=address, reason=reason)


class StoreTooOld(StoreError):
    """PostgreSQL at {address} is version {version}; Headrace needs 15 or newer."""

    def __init__(self, *, address: str, version: str) -> None:
        super().__init__(address=address, version=version)


class StoreNotMigrated(StoreError):
    """The database has schema version {found}, this code needs {needed}: run 'headrace migrate'."""

    def __init__(self, *, found: int, needed: int) -> None:
        super().__init__(found=found, needed=needed)


class DispatchError(HeadraceError):
    """{reason}"""


class DispatchUnavailable(DispatchError):
    """Redis at {address} cannot be reached ({reason})."""

    def __init__(self, *, address: str, reason: str) -> None:
        super().__init__(address=address, reason=reason)


class DispatchDamaged(DispatchUnavailable):
    """Redis at {address} holds under Headrace's names what is not Headrace's ({reason})."""


class DispatchTooOld(DispatchError):
    """Redis at {address} is version {version}; Headrace needs Redis 7.0 or any Valkey."""

    def __init__(self, *, address: str, version: str) -> None:
        super().__init__(address=address, version=version)


class EmbeddedServerFailed(HeadraceError):
    """The embedded {server} server failed: {reason} (more in {log})."""

    server: str
    log: str

    def __init__(self, *, server: str, reason: str, log: str) -> None:
        super().__init__(server=server, reason=reason, log=log)


class WebhookRefused(HeadraceError):
    """The callback's address may not be dialled: {reason}."""

    def __init__(self, *, reason: str) -> None:
        super().__init__(reason=reason)


class WebhookVerificationFailed(HeadraceError):
    """The callback's signature cannot be trusted: {reason}."""

    def __init__(self, *, reason: str) -> None:
        super().__init__(reason=reason)
