"""Requests to stop: signals, and the approaching end of the job.

A request only raises a flag on the rank that it reaches. Ranks agree on it at step boundaries, because what follows,
a checkpoint, needs all of them at the same step.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)


class _Abandoned(Exception):
    """Raised by the signal handler in the middle of waiting for data."""


class Interrupt:
    """What has asked this process to stop. Nothing does before `listen` or `stop_before`."""

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
        """Take SIGUSR1, SIGUSR2 and SIGTERM as requests to stop, from the main thread. Further ones change nothing."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def stop_before(self, end: float | None, minutes: float) -> None:
        """Ask to stop `minutes` before `end` (seconds since the epoch; None: unknown), by a timer, which wakes a
        waiting rank too. Of a shorter time than twice that, half is trained: a job must get on, or it would be requeued
        for ever."""
        if end is None or not minutes:
            return
        left = end - time.time()
        clock = time.strftime("%H:%M:%S", time.localtime(end))
        signal.signal(signal.SIGALRM, lambda *_: self._ask(f"the job ends at {clock}"))
        self._timed = True
        signal.setitimer(signal.ITIMER_REAL, max(left - 60 * minutes, left / 2, 0.001))

    def fetch(self, batches: Iterator[Any]) -> Any | None:
        """The next of `batches`; None when this rank is asked to stop, before or while it waits."""
        try:
            with self._abandoning():
                return next(batches)
        except _Abandoned:
            return None

    @contextmanager
    def _abandoning(self) -> Iterator[None]:
        self._waiting = True  # first, so that a signal between these two lines is not overlooked
        try:
            if self.reason is not None:
                raise _Abandoned
            yield
        finally:
            self._waiting = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._ask(signal.Signals(number).name)

    def _ask(self, reason: str) -> None:
        first, self.reason = self.reason is None, self.reason or reason
        if first and self._waiting:
            self._waiting = False  # a second signal must not cut short what follows
            raise _Abandoned
