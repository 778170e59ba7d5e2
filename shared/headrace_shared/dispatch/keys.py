"""Every key that Headrace has in Redis, and what it holds. All of it can be lost.

A queue's name is `<lane>:<route>:<tenant>`, route and tenant percent-encoded, so that a colon in
a model's name never splits it (a lane's name has none). One of jobs that came with an API key ends in `%00`
and the key's name: the store keeps no text with that character, and a version that knows no queues of keys
reads it as part of the tenant. Keys carry no hash tags: one server, or one shard.
"""

from urllib.parse import quote, unquote

from headrace_shared.ids import JobId, Lane, RouteName, Tenant
from headrace_shared.job import Queue

ALL = "headrace:*"
"""The pattern of every key."""

ACTIVE = "headrace:active:"
"""+ lane:tenant: ZSET of the tenant's queue names by virtual time; queues that may have a job due."""

BELL = "headrace:bell:"
"""+ lane: LIST; a token wakes one waiting worker."""

BREAKER = "headrace:breaker:"
"""+ provider/model: HASH of a breaker's state and its rolling counts."""

CLOCK = "headrace:clock"
"""STRING: milliseconds that tests add to the server's time."""

COST = "headrace:cost:"
"""+ queue name: STRING; what a job of it costs in the mean, what those that are out were charged, and how
many they are; nano-USD."""

DEEP = "headrace:deep"
"""SET of queue names whose window was full: more of their jobs may be due in Postgres."""

ENDED = "headrace:ended:"
"""+ job id: CHANNEL; a message when the job has ended."""

FED = "headrace:fed"
"""STRING: the run id of the server that the feeder fills. Where it is missing or another's, what is
in the queues was wiped or is an old copy: the next claim rings the feeder, which starts afresh."""

FEEDER_BELL = "headrace:bell-feeder"
"""LIST; a token wakes the feeder."""

FULL = "headrace:full:"
"""+ name of a cap: SET of `lane:tenant`, or for a key's of queue names, that wait until one of its jobs
ends."""

GATES = "headrace:gates"
"""HASH: `<dimension>|<reason>` -> milliseconds until it opens by itself, 0 for never."""

HOLDS = "headrace:holds"
"""HASH: hold id -> amount and the counters it stands in; `epoch` as in `headrace:money`."""

HOLD_LEASES = "headrace:hold-leases"
"""ZSET: hold id by the millisecond its lease ends."""

HUNGRY = "headrace:hungry"
"""SET of queue names whose window is half empty although they are deep."""

LANES = "headrace:lanes"
"""HASH: lane -> virtual time; `floor:<lane>` -> virtual time of its last served tenant; `cost:<lane>` ->
nano-USD of its mean job."""

LIMITER = "headrace:limiter:"
"""+ provider, or provider/model: HASH of numbers: when its next call may go, what was learned, was used."""

LIMITS = "headrace:limits"
"""HASH: `version` of the configuration that limits are of; `cap:<limiter>` and `route:<route>` out of it."""

MONEY = "headrace:money"
"""HASH: the epoch, the server's run id, the format of it all, the open windows and the budgets."""

OWED = "headrace:owed:"
"""+ lane:tenant, or queue name: STRING; the virtual time of a tenant that was served a moment ago and has
nothing due, and of a queue that is parked for a time."""

PARKED = "headrace:parked"
"""SET of queue names that a closed gate, or a provider's limit, keeps out of `active`."""

PERMITS = "headrace:permits:"
"""+ limiter: ZSET of calls under way by the millisecond their lease ends, where their number is limited."""

PROBE = "headrace:probe"
"""STRING: written by who asks whether the server takes writes."""

PROBING = "headrace:probing"
"""HASH: job id -> `<milliseconds until which it is shut>|<gate>`, for those that a breaker's gate let
through."""

QUEUE = "headrace:queue:"
"""+ queue name: ZSET of job ids by the millisecond they are due, or their lease ends (arq's form)."""

REBUILDING = "headrace:rebuilding"
"""STRING: there while a process puts the counters of budgets in place."""

RETRIES = "headrace:retries:"
"""+ provider: HASH of the fleet's successes and retries, in the slices of a rolling window."""

RUNNING = "headrace:running:"
"""+ name of a cap (`tenant:NAME` or `key:NAME`): ZSET of the ids that run under it by the millisecond their
lease ends."""

SPENT = "headrace:spent"
"""HASH: `<scope>|<window>|settled|held|suspense` -> nano-USD; `epoch` as in `headrace:money`."""

TENANTS = "headrace:tenants"
"""HASH: `weight|<tenant>` and `concurrent|<name of a cap>`, as configured; `version` of the configuration."""

TURN = "headrace:turn:"
"""+ lane: ZSET of tenants by virtual time, nano-USD / weight; tenants that may have a job due."""

WAITING = "headrace:waiting"
"""ZSET: queue name by the millisecond its next job is due, its gate opens, or there may be room again."""

WOKEN = "headrace:woken"
"""ZSET of ids that were woken while a run held them, and are due when that is finished, by the millisecond
until which that counts."""


_KEYED = "\0"


def queue_name(queue: Queue) -> str:
    owner = queue.tenant if queue.key is None else f"{queue.tenant}{_KEYED}{queue.key}"
    return f"{queue.lane}:{quote(queue.route, safe='')}:{quote(owner, safe='')}"


def parse_queue_name(name: str) -> Queue | None:
    """Read a queue's name; None for what is not one."""
    parts = name.split(":")
    if len(parts) != 3:  # noqa: PLR2004
        return None
    tenant, _, key = unquote(parts[2]).partition(_KEYED)
    queue = Queue(Lane(parts[0]), RouteName(unquote(parts[1])), Tenant(tenant), key or None)
    return queue if tenant and queue_name(queue) == name else None


def ended(job_id: JobId) -> str:
    return f"{ENDED}{job_id}"


def bell(lane: Lane) -> str:
    return f"{BELL}{lane}"


def breaker(target: str) -> str:
    return f"{BREAKER}{target}"


def retries(provider: str) -> str:
    return f"{RETRIES}{provider}"
