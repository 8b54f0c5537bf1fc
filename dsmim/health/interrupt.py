"""Requests to stop: signals, and the approaching end of the job.

A request only sets a flag on the rank that receives it. Ranks agree on it between two steps, because the checkpoint
that follows needs all of them at the same step.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)


class _StopWaiting(Exception):
    """Raised by the signal handler while this rank waits for data."""


class Interrupt:
    """What has asked this process to stop: `reason`, or None. Set up requests by `listen` and `stop_before`."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._waiting = self._timed = False

    def __enter__(self) -> Interrupt:
        return self

    def __exit__(self, *_: object) -> None:
        """Cancel the timer of `stop_before`: in a notebook the process outlives the run."""
        if self._timed:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def listen(self) -> None:
        """Treat SIGUSR1, SIGUSR2 and SIGTERM as requests to stop. Only the first counts. Call it in the main thread."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def stop_before(self, end: float | None, minutes: float) -> None:
        """Ask to stop `minutes` before `end`, by a timer, which also wakes a rank that waits for data.

        If less than twice that time is left, stop halfway: a job that makes no progress would be requeued for ever.
        end: seconds since 1970; None: unknown, and nothing is set up.
        """
        if end is None or not minutes:
            return
        left = end - time.time()
        clock = time.strftime("%H:%M:%S", time.localtime(end))
        signal.signal(signal.SIGALRM, lambda *_: self._request(f"the job ends at {clock}"))
        self._timed = True
        signal.setitimer(signal.ITIMER_REAL, max(left - 60 * minutes, left / 2, 0.001))

    def fetch(self, batches: Iterator[Any]) -> Any | None:
        """Return the next of `batches`; None when this rank has been asked to stop, before or while it waits."""
        try:
            with self._interruptible():
                return next(batches)
        except _StopWaiting:
            return None

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        self._waiting = True  # before the check of `reason`: a signal between the two must not be missed
        try:
            if self.reason is not None:
                raise _StopWaiting
            yield
        finally:
            self._waiting = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._request(signal.Signals(number).name)

    def _request(self, reason: str) -> None:
        first, self.reason = self.reason is None, self.reason or reason
        if first and self._waiting:
            self._waiting = False  # a second signal must not interrupt the saving that follows
            raise _StopWaiting
