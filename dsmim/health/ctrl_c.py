"""Ctrl-C in a terminal: the first one asks the run to save and stop, a second one ends the process at once."""

from __future__ import annotations

import os
import time

from dsmim.cluster.placement import is_first
from dsmim.health.outcome import CTRL_C
from dsmim.health.status import report

REPEAT = 1.5
"""Seconds in which another SIGINT counts as the same Ctrl-C. torchrun sends its ranks one of its own, a moment after
the terminal has sent one to every process."""


class CtrlC:
    """Counts Ctrl-C. `press` may be called from any thread."""

    def __init__(self) -> None:
        self._first: float | None = None

    def press(self) -> None:
        """Say what the first one does; end the process with status 130 at the second."""
        if self._first is None:
            self._first = time.monotonic()
            if is_first(os.environ):
                report("Ctrl-C: saving; press Ctrl-C again to leave at once")
        elif time.monotonic() - self._first > REPEAT:
            os._exit(CTRL_C)
