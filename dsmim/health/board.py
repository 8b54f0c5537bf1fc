"""The status board, on which every rank shows its status to the others.

It is kept in torch's TCPStore, the store through which the ranks met (their rendezvous): every launcher sets one up.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict
from datetime import timedelta

import torch.distributed as dist

from dsmim.cluster.placement import Placement
from dsmim.health.status import Phase, RankStatus


class StatusBoard:
    """A separate connection to the store, because torch locks a connection while it waits for an answer.

    patience: seconds to wait for the store. Raises OSError or torch's DistError when there is no store.
    """

    def __init__(self, place: Placement, patience: float):
        # A second, silent connection shows whether the store is still there. If it is not, torch would print pages of
        # C++ stack before it raises.
        self._probe = socket.create_connection((place.master_addr, place.master_port), patience)
        self._probe.setblocking(False)
        self._check_store()
        self._store = dist.TCPStore(
            place.master_addr, place.master_port, is_master=False, timeout=timedelta(seconds=patience),
            wait_for_workers=False,
        )  # fmt: skip
        # torchrun keeps its store when it restarts the ranks, and when they join a second group: what ranks said in an
        # earlier attempt or session must not count.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._keys = [f"dsmim/beat/{attempt}/{place.session}/{rank}" for rank in range(place.world_size)]

    def publish(self, rank: int, status: RankStatus) -> bool:
        """Replace a rank's status. Return False when the store is gone."""
        try:
            self._check_store()
            self._store.set(self._keys[rank], json.dumps(asdict(status)))
        except (OSError, dist.DistError):
            return False
        return True

    def read(self) -> list[RankStatus | None]:
        """Return every rank's last status; None for a rank that has never published one.

        Raises OSError or DistError when the store is gone.
        """
        self._check_store()
        keys, store = self._keys, self._store
        known = keys if store.check(keys) else [key for key in keys if store.check([key])]
        texts = dict(zip(known, store.multi_get(known) if known else [], strict=True))
        return [_parse(texts[key]) if key in texts else None for key in keys]

    def _check_store(self) -> None:
        try:
            alive = self._probe.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return
        if not alive:
            raise ConnectionError("closed")


def launcher_keeps_store() -> bool:
    """Return whether the store is in the launcher's process (torchrun) rather than in rank 0's."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def explain_lost_store(place: Placement, problem: Exception) -> str:
    """Return a sentence that says what it means when the store cannot be read."""
    keeper = "the launcher on rank 0's node" if launcher_keeps_store() else "rank 0's process"
    what = "does not answer: it is stopped, or its node or network is down" if _is_timeout(problem) else "is gone"
    return f"{keeper}, which keeps the rendezvous ({place.master_addr}:{place.master_port}), {what} ({problem})"


def _is_timeout(problem: Exception) -> bool:
    return isinstance(problem, TimeoutError) or "timeout" in str(problem).lower()


def _parse(text: bytes) -> RankStatus:
    values = json.loads(text)
    return RankStatus(**values | {"phase": Phase(**values["phase"])})
