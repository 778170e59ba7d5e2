"""What money is counted under: everything, a tenant, an API key, a model, a batch, a tag."""

import re
from collections.abc import Collection
from typing import TypeGuard
from uuid import UUID

from headrace_shared.errors import InvalidRequest
from headrace_shared.ids import RouteName
from headrace_shared.job import ClaimedJob, Job

GLOBAL = "global"

MAX_TAGS = 8
MAX_MODEL_LENGTH = 200

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_TAG = re.compile(r"[A-Za-z0-9._:/=@+-]{1,64}")


def scopes_of(job: ClaimedJob | Job, model: RouteName) -> tuple[str, ...]:
    """Return the scopes that a job's call of a model spends from, in a fixed order.

    Args:
        job: whose call it is.
        model: its public name, which for a job that is a request itself is the job's route.

    """
    return (
        GLOBAL,
        f"tenant:{job.tenant}",
        *((f"key:{job.api_key}",) if job.api_key else ()),
        f"model:{model}",
        *((batch_scope(job.batch_id),) if job.batch_id else ()),
        *(f"tag:{tag}" for tag in job.tags),
    )


def batch_scope(batch_id: UUID) -> str:
    return f"batch:{batch_id}"


def gate_dimension(scope: str) -> tuple[str, str] | None:
    """Return the kind and the name of the gate before a scope's queues; None where it has none.

    The jobs of a batch or a tag stand in queues that others share.
    """
    kind, _, name = scope.partition(":")
    match kind:
        case "global" | "tenant" | "key":
            return kind, name
        case "model":
            return "route", name
        case _:
            return None


def parse_scope(text: str) -> str:
    """Read a scope as somebody writes it.

    Raises:
        InvalidRequest: it is none, and says what one looks like.

    """
    kind, separator, name = text.partition(":")
    match kind:
        case "global" if not separator:
            return text
        case "tenant" | "key" if _NAME.fullmatch(name):
            return text
        case "tag":
            return f"tag:{check_tag(name)}"
        case "model" if 0 < len(name) <= MAX_MODEL_LENGTH and name.isprintable() and " " not in name:
            return text
        case "batch":
            return batch_scope(_batch_id(text, name))
        case _:
            raise _no_scope(text)


def check_tags(tags: object) -> tuple[str, ...]:
    """Return tags sorted, each once.

    Raises:
        InvalidRequest: they are too many, or one of them is none.

    """
    if not _is_list(tags):
        raise InvalidRequest(field="tags", reason="must be a list of strings")
    found = tuple(sorted({check_tag(tag) for tag in tags}))
    if len(found) > MAX_TAGS:
        raise InvalidRequest(field="tags", reason=f"must be at most {MAX_TAGS}")
    return found


def _is_list(tags: object) -> TypeGuard[Collection[object]]:
    return isinstance(tags, list | tuple | set | frozenset)


def check_tag(tag: object) -> str:
    if not isinstance(tag, str) or not _TAG.fullmatch(tag):
        raise InvalidRequest(
            field="tags", reason="must each be 1 to 64 letters, digits and any of . _ - : / = @ +"
        )
    return tag


def check_api_key_name(name: object) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidRequest(
            field="api_key",
            reason="must be a key's name: 1 to 64 letters, digits, dots, dashes and underscores",
        )
    return name


def _batch_id(text: str, name: str) -> UUID:
    try:
        return UUID(name)
    except ValueError:
        raise _no_scope(text) from None


def _no_scope(text: str) -> InvalidRequest:
    return InvalidRequest(
        field="scope",
        reason=f"{text!r:.80} is not a scope: global, tenant:NAME, key:NAME, model:NAME, batch:ID, tag:TAG",
    )
