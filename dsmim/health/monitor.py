"""What a run needs to learn that a rank is missing: this rank's heartbeat, watchdog and diagnosis, as one object."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable

from dsmim.cluster.placement import Placement
from dsmim.health.board import launcher_keeps_store
from dsmim.health.diagnosis import diagnose, wait_for_readers
from dsmim.health.heartbeat import INTERVAL, Heartbeat
from dsmim.health.outcome import FAILED, LOST
from dsmim.health.peer_watch import PeerWatch
from dsmim.health.status import LEFT, LEFT_ALONE, WORKING, Progress, report
from dsmim.health.watchdog import GRACE, Watchdog


class RankMonitor:
    """Shows the other ranks what this rank does, ends it when it hangs, and names the ranks that do not answer it.

    limit_seconds: the watchdog ends the process with status 70 (1 when another rank has given its reason) when `phase`
    is not called for this time and `grace` seconds more. every_beat: called every `interval` seconds from the thread of
    the heartbeat.
    """

    def __init__(self, place: Placement, limit_seconds: float, every_beat: Callable[[], None] = lambda: None,
                 interval: float = INTERVAL, grace: float = GRACE):  # fmt: skip
        self.peer_failed = False
        """Known after `diagnose`: another rank ended by itself, and has printed the reason."""
        self._place, self._who = place, f"rank {place.rank} on {socket.gethostname()}"
        self._progress = Progress()
        self._beat = Heartbeat(place, self._progress, every_beat, interval)
        self._peers: PeerWatch | None = None
        self._watchdog = Watchdog(self._who, self._progress, limit_seconds, grace, interval / 2, self._before_exit)

    @property
    def limit(self) -> float:
        """Seconds without progress that are allowed. May be set at any time."""
        return self._watchdog.limit

    @limit.setter
    def limit(self, seconds: float) -> None:
        self._watchdog.limit = seconds

    def phase(self, name: str, step: int | None = None) -> None:
        """Record that the main thread begins something, which counts as progress. Costs nothing.

        Every rank must call it equally often: the rank that has called it least is the one that the others wait for. So
        begin the next phase before a collective that waits for the slowest rank of the last phase.
        """
        self._progress.begin(name, step)

    def watch_peers(self, asked: Callable[[], bool]) -> None:
        """End the process, as `diagnose` says, if another rank is gone and this one is `asked` to stop but waits."""
        if self._place.world_size > 1:
            self._peers = PeerWatch(self._place, self._progress, self._beat, asked, self._leave)

    def diagnose(self) -> str:
        """Return a sentence that names the ranks the others wait for. For a rank whose collective has failed.

        Takes some seconds. Never raises.
        """
        text, self.peer_failed = diagnose(self._place, self._beat)
        self._progress.restart_clock()  # the watchdog must not end the process while it reports
        return text

    def close(self, alone: bool = False) -> None:
        """Stop. The other ranks see that this rank has left, unless a diagnosis was made before.

        alone: because of an error that only this rank knows of.

        After a diagnosis, rank 0 stays for some seconds if its process holds the store, so that others can read it.
        """
        if self._beat.state == WORKING:
            self._beat.state = LEFT_ALONE if alone else LEFT
        elif self._place.rank == 0 and not launcher_keeps_store():
            with contextlib.suppress(Exception):  # the process ends anyway
                wait_for_readers(self._place, self._beat.interval)
        self._watchdog.close()
        if self._peers is not None:
            self._peers.close()
        self._beat.close()

    def _leave(self) -> None:
        os._exit(self._before_exit())

    def _before_exit(self) -> int:
        """Report for the watchdog whom this rank waits for; return the exit status."""
        if self._place.world_size > 1:
            report(f"{self._who}: {self.diagnose()}")
        self.close()
        return FAILED if self.peer_failed else LOST
