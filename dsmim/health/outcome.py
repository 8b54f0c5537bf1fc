"""How a run can end, and the exit status that a batch script reads. Imports nothing heavy: errors at the start of the
command line need it before torch is imported."""

from __future__ import annotations

from collections.abc import Callable

COMPLETE = 0
FAILED = 1
"""Something that a user can fix."""
LOST = 70
"""A rank died, stalled or could not be reached; starting again may help. EX_SOFTWARE of sysexits.h."""
STOPPED = 75
"""Stopped on request after at least one step, with everything saved; starting again resumes. EX_TEMPFAIL of
sysexits.h."""
NO_PROGRESS = 76
"""Stopped on request before the first step of this session. Starting again helps only if there is more time then."""
CTRL_C = 130
"""128 + SIGINT, as shells count."""


class Stopped(ValueError):
    """An error that every rank has seen. Rank 0 prints it; the others end without a message."""


class NoProgress(Stopped):
    """The run was asked to stop before it had taken a step in this session: there is nothing new to save."""


class LostPeer(RuntimeError):
    """Another rank does not answer any more.

    status: the exit status, LOST, or FAILED when that rank has printed the reason. before_exit: call it after the
    message was printed and before the process ends; it waits for ranks that have not seen the failure yet.
    """

    def __init__(self, message: str, status: int = LOST, before_exit: Callable[[], None] = lambda: None):
        super().__init__(message)
        self.status, self.before_exit = status, before_exit
