"""Timeouts of torch's collectives (all-reduce, all-gather, barrier, …), and the errors that they raise."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d

from dsmim.health.watchdog import GRACE

# Parts of the messages of gloo, NCCL and torch's store when another rank does not answer.
_LOST_PEER = (
    "Connection closed by peer", "Connection reset by peer", "Connection refused", "Connection timed out",
    "Connection was likely closed", "Broken pipe", "No route to host", "Host is down", "connection abort",
    "Timed out waiting", "timed out after", "wait timeout", "Application timeout caused pair closure", "Socket Timeout",
    "ncclRemoteError", "communicator was aborted", "collective operation timeout",
)  # fmt: skip
_INTERFACE = "NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME must name a network interface that every node has, or be unset"
_OWN_FAULT = {
    "Duplicate GPU": "start as many ranks per node as it has GPUs, each with a GPU of its own",
    "no socket interface found": _INTERFACE,
    "Unable to find interface": _INTERFACE,
    "Unable to find address for": _INTERFACE,
    "ifa != nullptr": _INTERFACE,
    "EADDRINUSE": "another process of this node uses the port: set MASTER_PORT to a free one",
    "failed to listen": "set MASTER_PORT to a free port of rank 0's node",
    "ncclInvalid": "NCCL_DEBUG=WARN shows more",
}
"""Parts of the messages about the rank itself, which fails again when it is started again; and what to do."""


def is_lost_peer(error: BaseException) -> bool:
    """Return whether a collective raised this error because another rank, or the store, did not answer."""
    # gloo raises plain RuntimeErrors. So does a data worker, whose traceback ("Caught …") may hold the same words.
    text = str(error)
    if not isinstance(error, RuntimeError) or text.startswith("Caught ") or own_fault(error):
        return False
    return isinstance(error, (dist.DistStoreError, dist.DistNetworkError)) or any(part in text for part in _LOST_PEER)


def own_fault(error: BaseException) -> str | None:
    """Return why this rank cannot take part in collectives, with what to do, if the error says so; else None.

    For faults of the way in which the rank was started, such as two ranks on one GPU.
    """
    if not isinstance(error, RuntimeError) or str(error).startswith("Caught "):
        return None
    fix = next((fix for part, fix in _OWN_FAULT.items() if part in str(error)), None)
    return fix and f"{without_stack(error)}; {fix}"


def without_stack(error: BaseException) -> str:
    """Return the message of one of torch's errors on one line, without the C++ stack."""
    return " ".join(str(error).partition("\nException raised from")[0].split())


def set_timeout(seconds: float) -> None:
    """Set how long collectives wait from now on, in every process group that exists now.

    That includes DeepSpeed's groups, which start with torch's default timeout. With NCCL 60 seconds are added, so that
    the watchdog, which waits `GRACE` seconds more, reports first: NCCL's timeout aborts the process without a word.
    """
    change = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
    for group in list(distributed_c10d._world.pg_map):
        slack = 2 * GRACE if dist.get_backend(group) == "nccl" else 0.0
        change(timedelta(seconds=seconds + slack), group)
