"""After a request to stop: is another rank gone?

When a rank has failed, Slurm asks the others to stop by the signal that it also sends for a preemption (SIGTERM; since
26.05 it waits KillWait, 30 seconds by default, before it kills them). They cannot save without the rank that is gone,
and may wait for it in a collective until they are killed: then nobody would learn why the job ended.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from dsmim.cluster.placement import Placement
from dsmim.health.board import StatusBoard
from dsmim.health.diagnosis import ANSWER
from dsmim.health.heartbeat import Heartbeat
from dsmim.health.status import ENDING, LEFT_ALONE, WORKING, Progress, RankStatus

SILENT = 12.0
"""Seconds without a new beat after which a rank is taken for dead. A rank that saves may be silent for some."""
FAILURES = 2
"""Looks in a row at which the store must be gone, or a rank must have failed: the main thread usually sees it first."""


class PeerWatch:
    """A daemon thread that calls `gone` once another rank is gone and this one was asked to stop. It starts at once.

    asked: whether this rank was asked to stop. gone: must not return.
    """

    def __init__(self, place: Placement, progress: Progress, beat: Heartbeat, asked: Callable[[], bool],
                 gone: Callable[[], None]):  # fmt: skip
        self._place, self._progress, self._beat, self._asked, self._gone = place, progress, beat, asked, gone
        self._closed = threading.Event()
        self._seen: dict[int, tuple[int, float]] = {}  # rank → its last beat, and when that was first read
        threading.Thread(target=self._run, name="peer watch", daemon=True).start()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _run(self) -> None:
        board, failures = None, 0
        while not self._closed.wait(self._beat.interval):
            if not self._asked() or self._beat.state != WORKING or self._progress.phase.name == ENDING:
                continue
            try:
                board = board or StatusBoard(self._place, ANSWER)
                statuses = board.read()
            except Exception:  # the store is gone, and with it rank 0 or its launcher
                board, failed = None, True
            else:
                failed = any(status is not None and status.state == LEFT_ALONE for status in statuses)
                if self._silent(statuses):
                    self._gone()
            failures = failures + 1 if failed else 0
            if failures >= FAILURES:
                self._gone()

    def _silent(self, statuses: list[RankStatus | None]) -> bool:
        """Return whether a rank that works has said nothing new for `SILENT` seconds."""
        now, found = time.monotonic(), False
        for rank, status in enumerate(statuses):
            if status is None or rank == self._place.rank:
                continue
            if self._seen.get(rank, (None, now))[0] != status.beat:
                self._seen[rank] = (status.beat, now)
            found |= status.state == WORKING and now - self._seen[rank][1] > SILENT
        return found
