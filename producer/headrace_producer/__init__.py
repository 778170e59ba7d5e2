"""The client of Headrace: enqueue AI jobs, wait for their results."""

from headrace_producer.checking import JobRequest
from headrace_producer.client import Headrace, JobHandle, Page
from headrace_producer.results import JobResult, JobUsage
from headrace_producer.scripts import run
from headrace_producer.why import Why
from headrace_shared import errors, webhooks
from headrace_shared.job import Job, JobState
from headrace_shared.settings import Settings
from headrace_shared.store.jobs import Attempt

__all__ = [
    "Attempt",
    "Headrace",
    "Job",
    "JobHandle",
    "JobRequest",
    "JobResult",
    "JobState",
    "JobUsage",
    "Page",
    "Settings",
    "Why",
    "errors",
    "run",
    "webhooks",
]
