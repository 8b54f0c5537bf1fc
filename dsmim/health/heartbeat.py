"""The heartbeat: a thread that shows this rank's status to the other ranks every two seconds."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Callable

from dsmim.cluster.placement import Placement
from dsmim.health.board import StatusBoard
from dsmim.health.status import WORKING, Progress, RankStatus, report

INTERVAL = 2.0  # seconds between two beats
CONNECT = 60.0  # seconds to wait for the store at the start


class Heartbeat:
    """Publishes this rank's status on the status board, from a daemon thread that starts at once.

    state: what the next beats say, at first WORKING. every_beat: called with every beat; after an exception it is
    reported and not called again.
    """

    def __init__(self, place: Placement, progress: Progress, every_beat: Callable[[], None], interval: float):
        self.state, self.interval = WORKING, interval
        self._place, self._progress, self._every_beat = place, progress, every_beat
        self._host, self._beats, self._closed = socket.gethostname(), itertools.count(1), threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def status(self) -> RankStatus:
        """Return this rank's status now, as a new beat."""
        phase = self._progress.phase
        seconds = round(time.monotonic() - phase.begun, 1)
        return RankStatus(next(self._beats), time.time(), self._host, phase, seconds, self.state)

    def close(self) -> None:
        """Publish `state` a last time and stop."""
        self._closed.set()
        self._thread.join(2 * self.interval)

    def _run(self) -> None:
        board = self._connect() if self._place.world_size > 1 else None
        while True:
            if board and not board.publish(self._place.rank, self.status()):
                board = None  # the store ended with rank 0 or its launcher; the next collective will fail and say so
            if self._closed.is_set():
                return
            self._call_every_beat()
            self._closed.wait(self.interval)

    def _connect(self) -> StatusBoard | None:
        try:
            return StatusBoard(self._place, CONNECT)
        except Exception as error:  # training works without a heartbeat
            report(f"rank {self._place.rank}: no heartbeat, others cannot see it: the store does not answer ({error})")
            return None

    def _call_every_beat(self) -> None:
        try:
            self._every_beat()
        except Exception as error:  # the heartbeat must continue
            report(f"rank {self._place.rank}: {type(error).__name__}: {error}; not tried again")
            self._every_beat = lambda: None
