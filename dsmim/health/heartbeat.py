"""Who is missing, when ranks wait for one another in vain.

Each rank tells the others, through the rendezvous' store, what it is doing; the one whose collective broke reads what
they said last. A process that makes no progress ends itself, so that no job stands still until its time is up.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from dsmim.cluster.placement import Placement
from dsmim.health.blame import BROKEN, ENDED, JUDGED, WORKING, Entry, blame, whereabouts
from dsmim.health.board import Board, agent_keeps_store, store_lost
from dsmim.health.outcome import FAILED, LOST

INTERVAL = 2.0  # seconds between two beats
GRACE = 30.0  # seconds for a collective's own timeout, which knows more, to speak before the watchdog does
ANSWER = 8.0  # seconds in which the store must have answered
LINGER = 12.0  # seconds that rank 0, whose process may hold the store, waits at most for the others to have read it
STARTING = "starting"

_GLOO = (
    "gloo/", "Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe",
    "Timed out waiting", "Application timeout caused pair closure", "Socket Timeout", "NCCL",
)  # fmt: skip


class Heartbeat:
    """A rank's sign of life, its view of the others, and its watchdog. Both of its threads are daemons.

    limit_seconds: without a call of `phase` for so long and `grace`, the process says where it stands and ends with
    status 70; `limit` may be changed at any time. every_beat: called every two seconds or so from the beating thread.
    """

    def __init__(self, place: Placement, limit_seconds: float, every_beat: Callable[[], None] = lambda: None,
                 interval: float = INTERVAL, grace: float = GRACE):  # fmt: skip
        self.limit, self.grace, self.interval = limit_seconds, grace, interval
        self._place, self._every_beat, self._host = place, every_beat, socket.gethostname()
        self.peer_failed = False
        """Known after `diagnose`: another rank left by itself, for a reason that it has told."""
        self._state, self._beats, self._moves, self._ended = WORKING, itertools.count(1), 0, threading.Event()
        self.phase(STARTING)
        self._beating = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._beating.start()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def phase(self, name: str, step: int | None = None) -> None:
        """The main thread begins something; that is progress. Costs nothing.

        Every rank must call it equally often: the one that has called it least is the one that the others wait for. So
        a phase ends, by the next one's beginning, before the collective that waits for all to have done with it.
        """
        self._moves += 1
        self._now = (name, step, time.monotonic(), self._moves)

    def diagnose(self, error: BaseException | None = None) -> str:
        """Which ranks the others wait for, in a sentence. For a rank whose collective raised `error`.

        Takes some seconds, because a dead rank is one that is not heard of any more. Never raises.
        """
        if self._place.world_size == 1:
            return "there is no other rank"
        self._state = BROKEN
        try:
            return _within(ANSWER + 3 * self.interval, self._investigate)
        except Exception as problem:  # the store is gone, and whatever else may happen among ruins
            return store_lost(self._place, problem)
        finally:
            self._now = (*self._now[:2], time.monotonic(), self._moves)  # for the watchdog, which counts anew

    def close(self) -> None:
        """Stop, and tell the others that this rank left by itself. For the end of a run, for an error that only this
        rank knows of, and after `diagnose`, when rank 0 stays for some seconds if its process holds the store."""
        if self._state == WORKING:
            self._state = ENDED
        elif self._place.rank == 0 and not agent_keeps_store():
            with contextlib.suppress(Exception):  # leaving anyway
                _within(ANSWER + LINGER, self._linger)
        self._ended.set()
        self._beating.join(2 * self.interval)

    def _entry(self) -> Entry:
        name, step, since, moves = self._now
        seconds = round(time.monotonic() - since, 1)
        return Entry(next(self._beats), time.time(), self._host, step, name, seconds, moves, self._state)

    def _beat(self) -> None:
        board = self._connected() if self._place.world_size > 1 else None
        while True:
            if board and not board.publish(self._place.rank, self._entry()):
                board = None  # the store went with rank 0 or its launcher: collectives will tell
            if self._ended.is_set():
                return
            self._call()
            self._ended.wait(self.interval)

    def _call(self) -> None:
        try:
            self._every_beat()
        except Exception as error:  # it must not silence this rank
            _say(f"rank {self._place.rank}: {type(error).__name__}: {error}; not tried again")
            self._every_beat = lambda: None

    def _connected(self) -> Board | None:
        try:
            return Board(self._place, patience=60)
        except Exception as error:  # a run without this is still a run
            _say(f"rank {self._place.rank} will not be told from a dead one: the store does not answer ({error})")
            return None

    def _investigate(self) -> str:
        """Two looks at what all ranks say: who has not said anything new in between is dead, or as good as dead."""
        time.sleep(0.5 * self.interval)  # a store whose process is just dying would still take the connection
        board, own = Board(self._place, patience=ANSWER), self._place.rank
        board.publish(own, self._entry())
        first = board.read()
        time.sleep(2.5 * self.interval)
        second = board.read()
        self.peer_failed = any(entry is not None and entry.state == ENDED for entry in second)
        self._state = JUDGED
        board.publish(own, self._entry())
        return blame(first, second, own, time.time())

    def _linger(self) -> None:
        """The store goes with this process: let the others, which may know of the failure a little later, read it."""
        board = Board(self._place, patience=ANSWER)
        before, deadline = board.read(), time.monotonic() + min(LINGER, 6 * self.interval)
        while time.monotonic() < deadline:
            time.sleep(1.5 * self.interval)
            now = board.read()
            if not any(a and b and a.count != b.count and b.state != JUDGED for a, b in zip(before, now, strict=True)):
                return
            before = now

    def _watch(self) -> None:
        """Time in which the whole process was stopped does not count: it passes between two looks."""
        idle, seen, before = 0.0, self._now, time.monotonic()
        while not self._ended.wait(self.interval / 2):
            now = time.monotonic()
            idle = idle + min(now - before, 2 * self.interval) if seen is self._now else 0.0
            seen, before = self._now, now
            if idle > self.limit + self.grace:
                self._give_up(idle)

    def _give_up(self, idle: float) -> None:
        name, step, *_ = self._now
        who = f"rank {self._place.rank} on {self._host}"
        _say(f"{who}: no progress for {idle:.0f} s, at: {whereabouts(name, step)}; it ends here")
        faulthandler.dump_traceback(file=2, all_threads=True)
        if self._place.world_size > 1:
            _say(f"{who}: {self.diagnose()}")
        self.close()
        os._exit(FAILED if self.peer_failed else LOST)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective raised this because another rank, or the store, did not answer."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)  # gloo raises plain RuntimeErrors; a data worker's are handed on with its traceback in them
    return isinstance(error, RuntimeError) and not text.startswith("Caught ") and any(word in text for word in _GLOO)


def set_timeout(seconds: float) -> None:
    """How long collectives wait from now on, in every process group that there is now, DeepSpeed's among them, which
    start with torch's own default.

    On accelerators the watchdog speaks first, because NCCL's timeout aborts the process without a word from us.
    """
    change = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
    for group in list(distributed_c10d._world.pg_map):
        slack = 2 * GRACE if dist.get_backend(group) == "nccl" else 0.0
        change(timedelta(seconds=seconds + slack), group)


def _within(seconds: float, action: Callable[[], Any]) -> Any:
    """What `action` gives or raises, from a thread that is left behind when it takes longer: TimeoutError."""
    outcome: list[tuple[Any, Exception | None]] = []

    def run() -> None:
        try:
            outcome.append((action(), None))
        except Exception as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer for {seconds:.0f} s")
    value, problem = outcome[0]
    if problem is not None:
        raise problem
    return value
