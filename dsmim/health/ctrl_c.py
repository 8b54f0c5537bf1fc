"""Ctrl-C in a terminal: the first one asks the run to save and stop, a second one ends the process at once.

Python calls a signal's handler only between two instructions of the main thread, and that thread may wait in a
collective for minutes. So a thread of its own reads the signals, from the descriptor to which Python's C handler writes
the number of each (signal.set_wakeup_fd).
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time

from dsmim.cluster.placement import is_first
from dsmim.health.outcome import CTRL_C
from dsmim.health.status import report

REPEAT = 1.5
"""Seconds in which another SIGINT counts as the same Ctrl-C. torchrun sends its ranks one of its own, a moment after
the terminal has sent one to every process."""


def watch_ctrl_c() -> None:
    """Report the first SIGINT, and end the process with status 130 at the second. Call it in the main thread.

    The handler of SIGINT must be a function of Python; what it does is up to the caller.
    """
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    signal.set_wakeup_fd(writing.detach(), warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_forget)
    threading.Thread(target=_watch, args=(reading,), name="ctrl-c", daemon=True).start()


def _forget() -> None:
    """In a forked data worker: its signals are not those of the rank."""
    signal.set_wakeup_fd(-1)


def _watch(reading: socket.socket) -> None:
    first: float | None = None
    while numbers := reading.recv(64):
        if signal.SIGINT not in numbers:
            continue
        if first is None:
            first = time.monotonic()
            if is_first(os.environ):
                report("Ctrl-C: saving; press Ctrl-C again to leave at once")
        elif time.monotonic() - first > REPEAT:
            os._exit(CTRL_C)
