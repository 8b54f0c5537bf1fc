"""Requests to stop: signals, and the approaching end of the job.

A request only sets a flag on the rank that receives it. Ranks agree on it between two steps, because the checkpoint
that follows needs all of them at the same step.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

from dsmim.health.ctrl_c import CtrlC
from dsmim.health.signal_thread import watch_signals

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)


class _StopWaiting(Exception):
    """Raised by the signal handler while this rank waits for data."""


class Interrupt:
    """What has asked this process to stop: `reason`, or None. Set up requests by `listen` and `stop_before`."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.signalled = False
        """Whether a signal has asked to stop. Known at once, also while the main thread waits in a collective."""
        self._ctrl_c = CtrlC()
        self._waiting = False
        self._timers = ExitStack()

    def __enter__(self) -> Interrupt:
        return self

    def __exit__(self, *_: object) -> None:
        """Cancel the timer of `stop_before`, and restore the handler of SIGALRM that was set before: in a notebook
        the process outlives the run."""
        self._timers.close()

    def listen(self) -> None:
        """Treat SIGUSR1, SIGUSR2, SIGTERM and SIGINT as requests to stop. Only the first counts, but a second Ctrl-C
        ends the process. For a process that does nothing but train; call it in the main thread.

        A SIGINT that is ignored stays so: shells start background commands (`nohup`, `&`) in this way.
        """
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._on_signal)
        watch_signals(self._arrived)

    def stop_before(self, end: float | None, minutes: float) -> None:
        """Ask to stop `minutes` before `end`, by a timer, which also wakes a rank that waits for data.

        Only the main thread may handle signals. In another thread, the timer is a thread too: it sets `reason`, but
        cannot wake a rank that waits for data; the rank stops when it has its next batch.

        If less than twice that time is left, stop halfway: a job that makes no progress would be requeued for ever.
        end: seconds since 1970; None: unknown, and nothing is set up.
        """
        if end is None or not minutes:
            return
        left = end - time.time()
        reason = f"the job ends at {time.strftime('%H:%M:%S', time.localtime(end))}"
        in_main_thread = threading.current_thread() is threading.main_thread()
        start = self._start_alarm if in_main_thread else self._start_thread
        start(max(left - 60 * minutes, left / 2, 0.001), reason)

    def _start_alarm(self, seconds: float, reason: str) -> None:
        before = signal.signal(signal.SIGALRM, lambda *_: self._request(reason))
        self._timers.callback(signal.signal, signal.SIGALRM, before or signal.SIG_DFL)  # None: not set by Python
        self._timers.callback(signal.setitimer, signal.ITIMER_REAL, 0)  # runs first: no alarm for the old handler
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def _start_thread(self, seconds: float, reason: str) -> None:
        timer = threading.Timer(seconds, self._note, (reason,))
        timer.daemon = True
        self._timers.callback(timer.cancel)
        timer.start()

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
        self._request("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)

    def _arrived(self, number: int) -> None:
        """Called at once for every signal, in a thread."""
        self.signalled |= number in (*SIGNALS, signal.SIGINT)
        if number == signal.SIGINT:
            self._ctrl_c.press()

    def _note(self, reason: str) -> bool:
        """Set the reason if there is none, and return whether there was none."""
        first, self.reason = self.reason is None, self.reason or reason
        return first

    def _request(self, reason: str) -> None:
        if self._note(reason) and self._waiting:
            self._waiting = False  # a second signal must not interrupt the saving that follows
            raise _StopWaiting
