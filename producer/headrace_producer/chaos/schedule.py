"""When which fault is done to whom: drawn from a seed, the same every time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from headrace_producer.chaos.faults import Fault, Victim

WARM_UP = 4.0
"""Seconds before the first fault."""
EVERY = 2.8
"""Seconds from one fault to the next, more or less."""

_STEP = 0.25
_REST = 1.5
"""Seconds that a victim is left alone after a fault."""


@dataclass(frozen=True, slots=True)
class Event:
    """One fault, `at` so many seconds from the beginning, for so many `seconds`."""

    at: float
    fault: Fault
    victim: int
    """Which one, from 1, of those that there are several of."""
    seconds: float

    @property
    def until(self) -> float:
        return self.at + self.seconds

    @property
    def place(self) -> tuple[Victim, int]:
        """Where only one fault is done at a time."""
        return self.fault.victim, self.victim


def schedule(
    seed: int, seconds: float, faults: Sequence[Fault], victims: Mapping[Victim, int]
) -> tuple[Event, ...]:
    """Return the events of a run, in order; all of them are over after so many seconds.

    Args:
        seed: the same seed and the same faults give the same events.
        seconds: how long faults are done.
        faults: what may be done; every one of them is drawn before one is drawn again.
        victims: how many there are of each kind; one where it is not said.

    """
    drawing = _Drawing(seed, seconds, faults, victims)
    events: list[Event] = []
    at = WARM_UP
    while at < seconds and faults:
        event = drawing.draw(at)
        if event is None:
            at += _STEP
        else:
            events.append(event)
            at += drawing.random.uniform(0.6, 1.4) * EVERY
        at = round(at, 2)
    return tuple(events)


class _Drawing:
    """Faults in a random order, shuffled anew when all are drawn, and who is still at one."""

    def __init__(
        self, seed: int, seconds: float, faults: Sequence[Fault], victims: Mapping[Victim, int]
    ) -> None:
        self.random = Random(seed)  # noqa: S311 - repeatable on purpose
        self._seconds = seconds
        self._faults = faults
        self._victims = victims
        self._well_at: dict[tuple[Victim, int], float] = {}
        self._deck: list[Fault] = []

    def draw(self, at: float) -> Event | None:
        """Return the first fault in the deck that can be done now, to somebody who is well."""
        if not self._deck:
            self._deck = [fault for fault in self._faults for _ in range(fault.weight)]
            self.random.shuffle(self._deck)
        for fault in self._deck:
            well = self._well(fault.victim, at)
            longest = min(fault.longest, self._seconds - at)
            if well and longest >= fault.shortest:
                self._deck.remove(fault)
                # Cut, not rounded: an event is never over after the end.
                seconds = int(self.random.uniform(fault.shortest, longest) * 100) / 100
                event = Event(at, fault, self.random.choice(well), seconds)
                self._well_at[event.place] = event.until + _REST
                return event
        return None

    def _well(self, victim: Victim, at: float) -> list[int]:
        numbers = range(1, self._victims.get(victim, 1) + 1)
        return [number for number in numbers if self._well_at.get((victim, number), 0) <= at]
