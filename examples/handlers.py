"""A handler of your own: a long text is summed up part by part, and nothing is paid for twice.

In this folder, with `OPENAI_API_KEY` set (or `OPENAI_BASE_URL` set to what `headrace simulate-provider`
prints), start servers and a worker that has the handlers of this module:

    HEADRACE_HANDLERS=handlers headrace up

and in another terminal:

    python handlers.py some-text.txt

Stop the worker in the middle and start it again: it goes on with the part that is missing.
"""

import asyncio
import sys
from datetime import timedelta
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel

from headrace_producer import Headrace, run
from headrace_workers import Context, Depends, handler

CHAT = "/v1/chat/completions"
PART = 4000


class Document(BaseModel):
    text: str
    words: int = 60


class Summary(BaseModel):
    text: str
    parts: int


class Prompts(BaseModel):
    part: str
    whole: str


def load_prompts() -> Prompts:
    """Made once for the life of a worker, as a client or a pool would be."""
    return Prompts(part="Sum this up in three sentences:", whole="Make one text of {words} words of this:")


async def split(text: str) -> list[str]:
    """Any work that should not be done again: here it is cheap, elsewhere it fetches or converts."""
    return [text[start : start + PART] for start in range(0, len(text), PART)] or [""]


@handler("summarise", timeout=timedelta(minutes=10))
async def summarise(
    ctx: Context, document: Document, prompts: Annotated[Prompts, Depends(load_prompts)]
) -> Summary:
    parts = await ctx.step("split", split, document.text)
    done = 0

    async def sum_up(part: str) -> str:
        nonlocal done
        answer = await ctx.llm(CHAT, _question(f"{prompts.part}\n\n{part}"))
        done += 1
        await ctx.progress(done / (len(parts) + 1), f"{done} of {len(parts)} parts")
        return answer.text

    summaries = await asyncio.gather(*(sum_up(part) for part in parts))
    whole = prompts.whole.format(words=document.words)
    answer = await ctx.llm(CHAT, _question("\n\n".join([whole, *summaries])), name="whole")
    return Summary(text=answer.text, parts=len(parts))


def _question(text: str) -> dict[str, object]:
    return {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": text}]}


async def main(text: str) -> None:
    async with Headrace() as headrace:
        job = await headrace.enqueue("summarise", Document(text=text))
        result = await job.result()
    print(result.parse(Summary).text)
    print(f"{result.usage.total_tokens:,} tokens, ${result.usage.cost_usd:.6f}", file=sys.stderr)


if __name__ == "__main__":
    if len(sys.argv) != 2:  # noqa: PLR2004
        sys.exit("usage: handlers.py TEXT")
    run(main(Path(sys.argv[1]).read_text(encoding="utf-8")))
