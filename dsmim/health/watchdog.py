"""The watchdog: a thread that ends this process when it makes no progress, so that no job hangs to its time limit."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable

from dsmim.health.status import Progress, report

GRACE = 30.0  # seconds: the timeout of a collective knows more, so it gets this much longer to report first


class Watchdog:
    """Ends this process when no new phase begins for `limit` + `grace` seconds. A daemon thread that starts at once.

    who: names the process in the message. limit: may be changed at any time. period: seconds between two looks.
    before_exit: called before the process ends; returns its exit status.
    """

    def __init__(
        self, who: str, progress: Progress, limit: float, grace: float, period: float, before_exit: Callable[[], int]
    ):
        self.limit = limit
        self._who, self._progress, self._grace, self._period = who, progress, grace, period
        self._before_exit, self._closed = before_exit, threading.Event()
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _run(self) -> None:
        idle, seen, before = 0.0, self._progress.phase, time.monotonic()
        while not self._closed.wait(self._period):
            now, phase = time.monotonic(), self._progress.phase
            # Between two looks four periods count at most: while the whole process was stopped, nobody could progress.
            idle = idle + min(now - before, 4 * self._period) if phase is seen else 0.0
            seen, before = phase, now
            if idle > self.limit + self._grace:
                self._end_process(idle)

    def _end_process(self, idle: float) -> None:
        """Print the stacks of all threads and exit."""
        report(f"{self._who}: no progress for {idle:.0f} s, at: {self._progress.phase}; the process ends now")
        faulthandler.dump_traceback(file=2, all_threads=True)
        os._exit(self._before_exit())
