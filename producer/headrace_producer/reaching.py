"""A store that is away is one error, whatever the driver made of it."""

from collections.abc import Generator
from contextlib import contextmanager

from headrace_shared.errors import StoreUnavailable
from headrace_shared.store.pool import UNREACHABLE


@contextmanager
def reaching(address: str) -> Generator[None]:
    """Raise StoreUnavailable for what asyncpg raises when the server is away."""
    try:
        yield
    except UNREACHABLE as error:
        raise StoreUnavailable(address=address, reason=str(error) or type(error).__name__) from error
