"""Timeouts of torch's collectives (all-reduce, all-gather, barrier, …), and the errors that they raise."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d

from dsmim.health.watchdog import GRACE

# Parts of the messages of gloo and NCCL when another rank does not answer.
_LOST_PEER = (
    "gloo/", "Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe",
    "Timed out waiting", "Application timeout caused pair closure", "Socket Timeout", "NCCL",
)  # fmt: skip


def is_lost_peer(error: BaseException) -> bool:
    """Return whether a collective raised this error because another rank, or the store, did not answer."""
    if isinstance(error, dist.DistError):
        return True
    # gloo raises plain RuntimeErrors. So does a data worker, whose traceback ("Caught …") may hold the same words.
    text = str(error)
    return (
        isinstance(error, RuntimeError) and not text.startswith("Caught ") and any(part in text for part in _LOST_PEER)
    )


def set_timeout(seconds: float) -> None:
    """Set how long collectives wait from now on, in every process group that exists now.

    That includes DeepSpeed's groups, which start with torch's default timeout. With NCCL 60 seconds are added, so that
    the watchdog, which waits `GRACE` seconds more, reports first: NCCL's timeout aborts the process without a word.
    """
    change = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
    for group in list(distributed_c10d._world.pg_map):
        slack = 2 * GRACE if dist.get_backend(group) == "nccl" else 0.0
        change(timedelta(seconds=seconds + slack), group)
