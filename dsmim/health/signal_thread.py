"""A thread that sees signals at once.

Python calls a signal's handler between two instructions of the main thread, and that thread may wait in a collective
for minutes. But its C handler writes the signal's number to a descriptor at once (signal.set_wakeup_fd).
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable


def watch_signals(arrived: Callable[[int], None]) -> None:
    """Call `arrived` from a daemon thread with the number of each signal that has a handler in Python.

    Call it in the main thread, once. Forked processes are not watched.
    """
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    signal.set_wakeup_fd(writing.detach(), warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_forget)
    threading.Thread(target=_watch, args=(reading, arrived), name="signals", daemon=True).start()


def _forget() -> None:
    signal.set_wakeup_fd(-1)


def _watch(reading: socket.socket, arrived: Callable[[int], None]) -> None:
    while numbers := reading.recv(64):
        for number in numbers:
            arrived(number)
