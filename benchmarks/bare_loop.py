"""What one would write instead: `AsyncOpenAI` as its documentation shows it, each answer into Postgres.

`bare_loop.py CONCURRENCY WARM_UP JOBS`, with DATABASE_URL and the variables of the SDK. It
has no budgets, no retries of its own, no limits, and loses what it has not finished.
"""

import asyncio
import json
import os
import resource
import sys
import time

import asyncpg
from openai import AsyncOpenAI

_TABLE = """CREATE TABLE IF NOT EXISTS bare_results (
    id bigserial PRIMARY KEY, prompt text NOT NULL, answer text, prompt_tokens int, completion_tokens int)"""
_INSERT = (
    "INSERT INTO bare_results (prompt, answer, prompt_tokens, completion_tokens) VALUES ($1, $2, $3, $4)"
)


class BareLoop:
    def __init__(self, client: AsyncOpenAI, pool: "asyncpg.Pool[asyncpg.Record]", concurrency: int) -> None:
        self._client = client
        self._pool = pool
        self._semaphore = asyncio.Semaphore(concurrency)

    async def run(self, jobs: int) -> None:
        await asyncio.gather(*(self._answer(f"Say hello to number {number}.") for number in range(jobs)))

    async def _answer(self, prompt: str) -> None:
        async with self._semaphore:
            completion = await self._client.chat.completions.create(
                model="gpt-4o-mini", messages=[{"role": "user", "content": prompt}]
            )
            usage = completion.usage
            await self._pool.execute(
                _INSERT,
                prompt,
                completion.choices[0].message.content,
                usage.prompt_tokens if usage else None,
                usage.completion_tokens if usage else None,
            )


def cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def main(concurrency: int, warm_up: int, jobs: int) -> None:
    async with asyncpg.create_pool(os.environ["DATABASE_URL"]) as pool, AsyncOpenAI() as client:
        await pool.execute(_TABLE)
        loop = BareLoop(client, pool, concurrency)
        await loop.run(warm_up)
        began, used = time.perf_counter(), cpu()
        await loop.run(jobs)
        print(json.dumps({"seconds": time.perf_counter() - began, "cpu": cpu() - used}), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*(int(argument) for argument in sys.argv[1:4])))
