"""A provider that answers exactly what it is told, byte for byte, and not before it is told."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from headrace_shared.testing.simulated_provider import listening_socket


@dataclass(frozen=True, slots=True)
class Scripted:
    """One answer."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict[str, str])


def completion(text: str = "Hello", *, prompt_tokens: int = 9, completion_tokens: int = 3) -> Scripted:
    """Return a chat completion, with the tokens it reports."""
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return Scripted(
        body=json.dumps({"object": "chat.completion", "choices": [choice], "usage": usage}).encode()
    )


def refusal(
    status: int, message: str, *, code: str = "", headers: Mapping[str, str] | None = None
) -> Scripted:
    body = json.dumps({"error": {"message": message, "code": code}}).encode()
    return Scripted(status, body, headers or {})


class ScriptedProvider:
    """Answers are given in turn, the last one for ever, once `open` is set (it is, at first)."""

    def __init__(self, answers: Sequence[Scripted]) -> None:
        self.requests: list[bytes] = []
        self.heads: list[str] = []
        """The request line and the headers of each request, as they came."""
        self.open = asyncio.Event()
        self.open.set()
        self._answers = list(answers)
        self._arrived = asyncio.Condition()
        self._port = 0
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Future[None], asyncio.StreamWriter] = {}

    async def __aenter__(self) -> Self:
        listening = listening_socket("127.0.0.1", 0)
        self._port = listening.getsockname()[1]
        self._server = await asyncio.start_server(self._serve, sock=listening)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.close()
        for writer in self._connections.values():
            writer.transport.abort()
        self.open.set()
        await asyncio.gather(*self._connections)

    @property
    def url(self) -> str:
        return f"{self.address}/v1"

    @property
    def address(self) -> str:
        """Without a path."""
        return f"http://127.0.0.1:{self._port}"

    def script(self, *answers: Scripted) -> None:
        """Give these answers from now on."""
        self._answers = list(answers)

    async def arrived(self, count: int) -> None:
        """Wait until there have been so many requests."""
        async with self._arrived:
            await self._arrived.wait_for(lambda: len(self.requests) >= count)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._connections[ended] = writer
        try:
            while not writer.is_closing():
                await self._exchange(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
            ended.set_result(None)

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            (
                int(line.split(b":")[1])
                for line in head.split(b"\r\n")
                if line.lower().startswith(b"content-length:")
            ),
            0,
        )
        body = await reader.readexactly(length)
        async with self._arrived:
            self.requests.append(body)
            self.heads.append(head.decode("latin-1"))
            self._arrived.notify_all()
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        await self.open.wait()
        writer.write(_wire(answer))
        await writer.drain()


def _wire(answer: Scripted) -> bytes:
    headers = {"content-type": "application/json", "content-length": str(len(answer.body)), **answer.headers}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode()
    return b"HTTP/1.1 %d X\r\n%b\r\n%b" % (answer.status, lines, answer.body)
