"""Memory and open files of a rank and its node: figures for the log, and a warning before the kernel kills a process.

The resident memory of a data worker includes the pages that it shares with its rank, which forked it. Sums over
processes are therefore upper bounds. The memory left is not computed from them: see memory_limit.
"""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil

from dsmim.cluster.placement import Placement
from dsmim.health.memory_limit import Limit, memory_limit

AGAIN = 600.0  # seconds after which a warning that is still true is repeated
BETTER = 1.5  # a second warning needs at least this many times the limit to have been left in between
FEW_FILES = 0.1  # warn when less than this share of a process's open files is left
NAMED = 5  # how many processes a warning names
Sample = dict[str, Any]


class HostMonitor:
    """Measures this rank and its node.

    say_warning: receives a warning, in the thread that calls `warn_if_low`. low_memory: warn when less than this share
    of the memory that the job may use on this node is left.
    """

    def __init__(self, place: Placement, say_warning: Callable[[str], None], low_memory: float):
        self.place, self.say, self.low_memory = place, say_warning, low_memory
        self.host, self.process = socket.gethostname(), psutil.Process()
        self._memory, self._files = _Warning(), _Warning()

    def sample(self) -> Sample:
        """Return the figures of this rank and its node, in bytes. Takes about a millisecond per data worker."""
        workers = [_resident(child) for child in _children(self.process)]
        limit = memory_limit(os.environ)
        return {
            "rank": self.place.rank,
            "host": self.host,
            "rank_bytes": _resident(self.process),
            "workers": len(workers),
            "workers_bytes": sum(workers),
            "largest_worker_bytes": max(workers, default=0),
            "open_files": self.process.num_fds(),
            "left_bytes": limit.left,
            "limit_bytes": limit.total,
        }

    def warn_if_low(self) -> None:
        """Warn once when little memory or few open files are left. For one rank of a node, every few seconds."""
        limit = memory_limit(os.environ)
        if self._memory.due(limit.left / limit.total, self.low_memory):
            self.say(self._low_memory(limit))
        used, process = max(((_files_used(p), p) for p in self._family()), key=lambda pair: pair[0])
        if self._files.due(1 - used, FEW_FILES):
            self.say(self._few_files(process))

    def _family(self) -> list[psutil.Process]:
        return [self.process, *_children(self.process)]

    def _low_memory(self, limit: Limit) -> str:
        return (
            f"{self.host} (rank {self.place.rank}): only {_gb(limit.left)} of {_gb(limit.total)} of memory are left "
            f"({limit.source}); a process may be killed soon. Largest: {', '.join(_largest())}. Fewer data.workers "
            "need less; so do a smaller batch.eval_batch and checkpoint.background=false; or request more memory"
        )

    def _few_files(self, process: psutil.Process) -> str:
        return (
            f"{self.host} (rank {self.place.rank}): {_describe_process(process)} has {process.num_fds()} files open; "
            f"its limit is {_file_limit(process):.0f}: raise it (ulimit -n) in the job, or choose a smaller "
            "data.shuffle_window"
        )


def merge(samples: list[Sample]) -> dict[str, float]:
    """Merge all ranks' samples into figures for the log: memory in 10^9 bytes; `…_of` is the rank of an extreme."""

    def most(key: str, by: Callable[..., Any] = max) -> Sample:
        return by(samples, key=lambda sample: sample[key])

    least = min(samples, key=lambda sample: sample["left_bytes"] / sample["limit_bytes"])
    return {
        "host_rank_gb": most("rank_bytes")["rank_bytes"] / 1e9,
        "host_rank_gb_of": most("rank_bytes")["rank"],
        "host_ranks_gb_sum": sum(sample["rank_bytes"] for sample in samples) / 1e9,
        "host_workers": sum(sample["workers"] for sample in samples),
        "host_worker_gb": most("largest_worker_bytes")["largest_worker_bytes"] / 1e9,
        "host_worker_gb_of": most("largest_worker_bytes")["rank"],
        "host_workers_gb_sum": sum(sample["workers_bytes"] for sample in samples) / 1e9,
        "host_open_files": most("open_files")["open_files"],
        "host_open_files_of": most("open_files")["rank"],
        "host_memory_left": least["left_bytes"] / least["limit_bytes"],
        "host_memory_left_of": least["rank"],
    }


def describe(samples: list[Sample]) -> str:
    """Return the merged figures as a sentence, with the names of the hosts."""
    figures = merge(samples)
    hosts = {sample["rank"]: sample["host"] for sample in samples}

    def where(key: str) -> str:
        rank = int(figures[f"{key}_of"])
        return f"rank {rank} on {hosts[rank]}"

    return (
        f"memory: a rank up to {figures['host_rank_gb']:.1f} GB ({where('host_rank_gb')}), a data worker up to "
        f"{figures['host_worker_gb']:.1f} GB; {figures['host_memory_left']:.0%} left ({where('host_memory_left')}); "
        f"open files up to {figures['host_open_files']:.0f}"
    )


class _Warning:
    """Decides when to give a warning: once; again when it got better and then worse, or after AGAIN seconds."""

    def __init__(self) -> None:
        self.given: float | None = None

    def due(self, left: float, limit: float) -> bool:
        """Return whether to warn now. left, limit: shares; warn when left < limit."""
        now = time.monotonic()
        if left >= min(1.0, limit * BETTER):
            self.given = None
        if left >= limit or (self.given is not None and now - self.given < AGAIN):
            return False
        self.given = now
        return True


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def _resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.Error:  # the process has ended in between
        return 0


def _files_used(process: psutil.Process) -> float:
    """Return the share of the files that a process may open which it has open."""
    try:
        return process.num_fds() / _file_limit(process)
    except psutil.Error:
        return 0.0


def _file_limit(process: psutil.Process) -> float:
    """Return how many files a process may open. Where psutil cannot tell (macOS), the limit of this process, which its
    children have inherited."""
    if hasattr(process, "rlimit"):
        soft, _ = process.rlimit(psutil.RLIMIT_NOFILE)
    else:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return float("inf") if soft == resource.RLIM_INFINITY else soft


def _largest() -> Iterator[str]:
    """Describe the processes of this machine that use most memory."""
    processes = sorted(psutil.process_iter(), key=_resident, reverse=True)[:NAMED]
    return (f"{_describe_process(process)} {_gb(_resident(process))}" for process in processes)


def _describe_process(process: psutil.Process) -> str:
    """Return a process's name and number, and its rank (a data worker's too) where its environment may be read."""
    try:
        env = process.environ()
    except (psutil.Error, OSError):
        env = {}
    names = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
    rank = next((env[name] for name in names if env.get(name)), "")
    try:
        return f"{process.name()} {process.pid}" + (f" of rank {rank}" if rank else "")
    except psutil.Error:
        return f"process {process.pid}"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
