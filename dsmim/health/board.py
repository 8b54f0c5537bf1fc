"""Where ranks leave word for one another: the store of the rendezvous that every launcher sets up anyway."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import astuple
from datetime import timedelta

import torch.distributed as dist

from dsmim.cluster.placement import Placement
from dsmim.health.blame import Entry


class Board:
    """A connection of its own to the store: torch locks one while it waits for an answer.

    patience: seconds to wait for the store. Raises OSError or torch's DistError when there is none.
    """

    def __init__(self, place: Placement, patience: float):
        # A silent connection beside torch's shows whether the store is still there: torch, when it is not, prints
        # pages of stack from C++ before it raises.
        self._probe = socket.create_connection((place.master_addr, place.master_port), patience)
        self._probe.setblocking(False)
        self._check()
        self._store = dist.TCPStore(
            place.master_addr, place.master_port, is_master=False, timeout=timedelta(seconds=patience),
            wait_for_workers=False,
        )  # fmt: skip
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives a restarted world
        self._keys = [f"dsmim/beat/{attempt}/{rank}" for rank in range(place.world_size)]

    def publish(self, rank: int, entry: Entry) -> bool:
        """Put up a rank's entry in place of its last. False when the store is gone."""
        try:
            self._check()
            self._store.set(self._keys[rank], json.dumps(astuple(entry)))
        except (OSError, dist.DistError):
            return False
        return True

    def read(self) -> list[Entry | None]:
        """Every rank's last entry; None of one that never put up any. Raises OSError or DistError."""
        self._check()
        keys, store = self._keys, self._store
        known = keys if store.check(keys) else [key for key in keys if store.check([key])]
        texts = dict(zip(known, store.multi_get(known) if known else [], strict=True))
        return [Entry(*json.loads(texts[key])) if key in texts else None for key in keys]

    def _check(self) -> None:
        try:
            alive = self._probe.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return
        if not alive:
            raise ConnectionError("closed")


def agent_keeps_store() -> bool:
    """Whether the launcher holds the store, as torchrun does, and not rank 0's process."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def store_lost(place: Placement, problem: Exception) -> str:
    """What it means that the store could not be read."""
    who = "the launcher on rank 0's node" if agent_keeps_store() else "rank 0's process"
    what = "does not answer: it is stopped, or its node or network is down" if _silent(problem) else "is gone"
    return f"{who}, which keeps the rendezvous ({place.master_addr}:{place.master_port}), {what} ({problem})"


def _silent(problem: Exception) -> bool:
    return isinstance(problem, TimeoutError) or "timeout" in str(problem).lower()
