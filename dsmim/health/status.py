"""What a rank says about itself: its current phase, and the status that it shows to the other ranks."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace

WORKING = "working"
BROKEN = "broken"
"""A collective of this rank has failed."""
DIAGNOSED = "diagnosed"
"""A collective of this rank has failed, and the rank has found out why."""
LEFT = "left"
"""The rank has ended together with the others."""
LEFT_ALONE = "left alone"
"""The rank has ended because of an error of its own."""
ENDING = "ending"
"""The name of a rank's last phase: it needs the others no more."""


@dataclass(frozen=True)
class Phase:
    """One piece of work of a rank, such as "training, step 41"."""

    name: str
    step: int | None
    begun: float
    """By time.monotonic()."""
    number: int
    """How many phases the rank has begun. All ranks begin the same phases in the same order."""

    def __str__(self) -> str:
        return self.name if self.step is None else f"{self.name}, step {self.step}"


class Progress:
    """The current phase of this rank. The main thread writes it; the heartbeat and the watchdog read it.

    A phase is replaced as a whole, so threads need no lock.
    """

    def __init__(self) -> None:
        self.phase = Phase("starting", None, time.monotonic(), 1)

    def begin(self, name: str, step: int | None = None) -> None:
        """Begin the next phase."""
        self.phase = Phase(name, step, time.monotonic(), self.phase.number + 1)

    def restart_clock(self) -> None:
        """Count the time of the current phase from now."""
        self.phase = replace(self.phase, begun=time.monotonic())


@dataclass(frozen=True)
class RankStatus:
    """What one rank last said about itself."""

    beat: int
    """Grows with every status of this rank."""
    time: float
    """When it was said, in seconds since 1970 by the clock of its node."""
    host: str
    phase: Phase
    seconds: float
    """How long the rank had been in that phase."""
    state: str
    """WORKING, BROKEN, DIAGNOSED, LEFT or LEFT_ALONE."""


def report(text: str) -> None:
    """Print a line to standard error at once."""
    print(text, file=sys.stderr, flush=True)
