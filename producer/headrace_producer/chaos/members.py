"""The processes of a run: each can be killed, frozen and replaced, and has its own ways to the servers."""

import asyncio
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from headrace_producer.chaos.faults import Victim, Way
from headrace_producer.processes import Child, start
from headrace_shared.testing.fault_proxy import FaultProxy


@dataclass(slots=True)
class Life:
    """One process of a member, from its start to its end."""

    child: Child
    began: float
    """On the monotonic clock."""
    ended: float | None = None
    expected: bool = False
    """Chaos ended it itself, or told it to."""

    @property
    def seconds(self) -> float:
        return (self.ended or time.monotonic()) - self.began


@dataclass(frozen=True, slots=True)
class Part:
    """What a member plays: how its processes are started."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    ways: Mapping[Way, FaultProxy]
    """Its own ways to the servers."""


class Member:
    """A worker or a producer, through all of its lives."""

    def __init__(self, kind: Victim, number: int, part: Part, directory: Path) -> None:
        self.name = f"{kind} {number}"
        self.ways = part.ways
        self.lives: list[Life] = []
        self.accidents: list[str] = []
        """Ends that nobody caused, in words."""
        self.one_at_a_time = asyncio.Lock()
        """Taken by whoever ends lives and begins others: an end can take longer than was planned for it."""
        self._part = part
        self._log = directory / f"{kind}-{number}"

    @property
    def pid(self) -> int:
        return self._life.child.pid

    @property
    def runs(self) -> bool:
        return bool(self.lives) and self._life.child.runs

    async def start(self, *, skewed_by: int = 0) -> None:
        """Begin another life; `skewed_by` are the seconds that its clock is wrong."""
        command = list(self._part.command)
        if skewed_by:
            at = command.index("worker")
            command = [*_SKEWED, str(skewed_by), *command[at:]]
        log = self._log.with_name(f"{self._log.name}.{len(self.lives) + 1}.log")
        child = await start(self.name, tuple(command), self._part.environment, log)
        self.lives.append(Life(child, time.monotonic()))

    async def kill(self) -> None:
        life = self._life
        life.expected = True
        await life.child.kill()
        life.ended = time.monotonic()

    async def end(self) -> None:
        """Ask it to end, as a deploy does."""
        if self.runs:
            life = self._life
            life.expected = True
            self.thaw()
            await life.child.end()
            life.ended = time.monotonic()

    def check(self) -> None:
        """Raise ProcessEnded when it does not run any more."""
        self._life.child.check()

    def freeze(self) -> None:
        self._life.child.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        if self.runs:
            self._life.child.signal(signal.SIGCONT)

    async def revive(self) -> None:
        """Do what a supervisor does with a process that has ended by itself, and note that it had to.

        One that could not begin, because a server was away, says so and ends with 2: that is no accident.
        """
        if not self.lives or self._life.child.runs or self._life.expected:
            return
        life, code = self._life, self._life.child.process.returncode
        life.expected, life.ended = True, time.monotonic()
        if code != _CANNOT_BEGIN or life.seconds > _BEGINNING_SECONDS:
            self.accidents.append(f"ended by itself with {code}: {_last_line(life.child)}")
        await self.start()

    @property
    def _life(self) -> Life:
        return self.lives[-1]


_CANNOT_BEGIN = 2
_BEGINNING_SECONDS = 30.0
_SKEWED = (sys.executable, "-P", "-m", "headrace_producer.chaos.skewed")


async def end_all(members: Sequence[Member]) -> None:
    await asyncio.gather(*(member.end() for member in members))


def _last_line(child: Child) -> str:
    lines = child.log.read_text(errors="replace").splitlines()
    return lines[-1] if lines else "it said nothing"
