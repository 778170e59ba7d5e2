"""Looks at both servers and says what would break a promise, before it does."""

from headrace_shared.doctor.examination import examine
from headrace_shared.doctor.findings import Finding, Level

__all__ = ["Finding", "Level", "examine"]
