"""How a run can end, and the exit status that tells a batch script which. Imports nothing heavy, so that errors can be
told apart before anything heavy is there."""

from __future__ import annotations

from collections.abc import Callable

COMPLETE = 0
FAILED = 1
"""Something that a user can mend."""
LOST = 70
"""A rank died, stalled or could not be reached; starting again may help. EX_SOFTWARE of sysexits.h."""
STOPPED = 75
"""Stopped on request with everything saved; starting again goes on. EX_TEMPFAIL of sysexits.h."""


class Stopped(ValueError):
    """An error that every rank knows of: rank 0 speaks, the others leave quietly."""


class LostPeer(RuntimeError):
    """Another rank does not answer any more.

    status: what to end with, LOST, or FAILED when that rank has told why; before_exit: to be called once this has been
    told, before the process ends: it waits for others that may still have to learn it.
    """

    def __init__(self, message: str, status: int = LOST, before_exit: Callable[[], None] = lambda: None):
        super().__init__(message)
        self.status, self.before_exit = status, before_exit
