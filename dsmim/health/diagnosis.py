"""The diagnosis: a rank whose collective has failed asks the status board which ranks are missing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from dsmim.cluster.placement import Placement
from dsmim.health.blame import name_missing
from dsmim.health.board import StatusBoard, explain_lost_store
from dsmim.health.heartbeat import Heartbeat
from dsmim.health.status import BROKEN, DIAGNOSED, LEFT, LEFT_ALONE

ANSWER = 8.0  # seconds in which the store must have answered
LINGER = 12.0  # seconds that rank 0 waits at most for the others to read the store


class Diagnosis(NamedTuple):
    """Why a collective failed."""

    text: str
    """Names the missing ranks in a sentence."""
    peer_left: bool
    """Whether another rank ended by itself; then it has printed the reason."""


def diagnose(place: Placement, beat: Heartbeat) -> Diagnosis:
    """Find out which ranks the others wait for.

    Takes 3 beats, because a dead rank is one that publishes nothing new, and `ANSWER` seconds more at most. Never
    raises. Sets beat.state.
    """
    if place.world_size == 1:
        return Diagnosis("there is no other rank", False)
    beat.state = BROKEN
    try:
        return _within(ANSWER + 3 * beat.interval, lambda: _ask_board(place, beat))
    except Exception as problem:  # the store is gone; after a failure anything else may be broken too
        return Diagnosis(explain_lost_store(place, problem), False)


def wait_for_readers(place: Placement, interval: float) -> None:
    """Wait until the other ranks have made their diagnosis, `LINGER` seconds or 6 beats at most.

    For the process that holds the store: it ends with that process, and others may learn of the failure a little later.
    Raises OSError, DistError or TimeoutError when the store does not answer.
    """
    _within(ANSWER + LINGER, lambda: _wait_for_readers(place, interval))


def _ask_board(place: Placement, beat: Heartbeat) -> Diagnosis:
    """Read the board twice: a rank that says nothing new in between is taken as lost."""
    time.sleep(0.5 * beat.interval)  # a store whose process is just ending would still accept a connection
    board = StatusBoard(place, ANSWER)
    board.publish(place.rank, beat.status())
    first = board.read()
    time.sleep(2.5 * beat.interval)
    second = board.read()
    beat.state = DIAGNOSED
    board.publish(place.rank, beat.status())
    peer_left = any(status is not None and status.state in (LEFT, LEFT_ALONE) for status in second)
    return Diagnosis(name_missing(first, second, place.rank, time.time()), peer_left)


def _wait_for_readers(place: Placement, interval: float) -> None:
    board = StatusBoard(place, ANSWER)
    before, deadline = board.read(), time.monotonic() + min(LINGER, 6 * interval)
    while time.monotonic() < deadline:
        time.sleep(1.5 * interval)
        now = board.read()
        # A rank that still beats, and has no diagnosis yet, will want to read.
        if not any(a and b and a.beat != b.beat and b.state != DIAGNOSED for a, b in zip(before, now, strict=True)):
            return
        before = now


def _within(seconds: float, action: Callable[[], Any]) -> Any:
    """Return what `action` returns, or raise what it raises. Raises TimeoutError when it takes longer than `seconds`.

    The action runs in a separate daemon thread, which is left running after a timeout.
    """
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
