"""A real PostgreSQL and a real Valkey for a laptop and for tests, without an installation.

The data is kept in a ``.headrace/`` folder. Whoever uses the servers holds a shared file
lock there; the last one out stops them, and the kernel releases the lock of one that was
killed.
"""

from headrace_shared.embedded.membership import embedded_servers, join
from headrace_shared.embedded.record import EmbeddedServers, find_running

__all__ = ["EmbeddedServers", "embedded_servers", "find_running", "join"]
