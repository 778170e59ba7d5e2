"""Work that goes on for as long as a service beside it does."""

import asyncio
from collections.abc import Coroutine
from typing import TypeVar

T = TypeVar("T")


async def beside(service: Coroutine[object, object, None], work: Coroutine[object, object, T]) -> T:
    """Do work while a service runs; a service that fails ends the work."""
    serving, working = asyncio.create_task(service), asyncio.create_task(work)
    try:
        await asyncio.wait((serving, working), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            serving.result()
        return await working
    finally:
        serving.cancel()
        working.cancel()
        await asyncio.gather(serving, working, return_exceptions=True)
