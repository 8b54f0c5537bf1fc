"""How much memory this process's job may use on its node, and how much of that is left.

Several limits can apply: the machine's memory, and the control groups (cgroups, version 1 or 2) in which Slurm or a
container has put the process. Where no control group sets a limit, the memory that the job requested from Slurm counts.
The limit with the smallest share left decides. Page cache that the kernel would free does not count as used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

from dsmim.cluster.placement import number


@dataclass(frozen=True)
class Limit:
    """A memory limit: bytes in all, bytes left, and what sets the limit."""

    total: int
    left: int
    source: str


@dataclass(frozen=True)
class _Version:
    """The file names of one version of control groups."""

    mount: str
    limit: str
    usage: str
    prefix: str
    """Before the names in memory.stat. In version 1, total_… includes all groups below, as version 2 always does."""


_V1 = _Version("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
_V2 = _Version("sys/fs/cgroup", "memory.max", "memory.current", "")
_CACHE = ("inactive_file", "active_file", "slab_reclaimable")  # tmpfs and shared memory cannot be freed


def memory_limit(env: Mapping[str, str], root: Path = Path("/")) -> Limit:
    """Return the limit with the smallest share left. env: the process's environment; root: where /proc and /sys are."""
    machine = psutil.virtual_memory()
    limits = [Limit(machine.total, machine.available, "the machine's memory")]
    limits += [limit for limit in _groups(root) if limit.total < machine.total]
    if len(limits) == 1 and (requested := _requested_from_slurm(env)) is not None and requested < machine.total:
        limits.append(Limit(requested, min(machine.available, requested - _used_by_job(env)), "requested from Slurm"))
    nearest = min(limits, key=lambda limit: limit.left / limit.total)
    return Limit(nearest.total, max(0, nearest.left), nearest.source)


def _groups(root: Path) -> Iterator[Limit]:
    """Yield the limit of every group that has one, from the process's own group up to the outermost."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" or "memory" in controllers.split(","):
            version = _V2 if number == "0" else _V1
            for folder in _upwards(root / version.mount, path):
                if (limit := _limit(folder, version)) is not None:
                    yield limit


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    """Yield the group's folder and all folders above it.

    In a container the path may be the host's. Then only the mount itself exists here.
    """
    inner = PurePosixPath(path.lstrip("/"))
    for part in (inner, *inner.parents):
        yield mount / part


def _limit(folder: Path, version: _Version) -> Limit | None:
    try:
        text = (folder / version.limit).read_text().strip()
        if text == "max":
            return None
        usage = int((folder / version.usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    cache = sum(int(stat.get(version.prefix + name, 0)) for name in _CACHE)
    return Limit(int(text), int(text) - max(0, usage - cache), f"control group {folder}")


def _requested_from_slurm(env: Mapping[str, str]) -> int | None:
    """Return bytes per node; None without a limit. A job that requests 0 gets all memory of the node.

    Raises ValueError, which names the variable, for what is no number of megabytes.
    """
    if per_node := number(env, "SLURM_MEM_PER_NODE", 0):
        return per_node * 2**20
    per_cpu, cpus = (number(env, name, 0) for name in ("SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"))
    return per_cpu * cpus * 2**20 or None


def _used_by_job(env: Mapping[str, str]) -> int:
    """Return the bytes of the job's processes on this node; pages that several share count once."""
    return sum(_share(process) for process in psutil.process_iter() if _in_job(process, env))


def _in_job(process: psutil.Process, env: Mapping[str, str]) -> bool:
    try:
        return process.environ().get("SLURM_JOB_ID") == env.get("SLURM_JOB_ID")
    except (psutil.Error, OSError):  # another user's process
        return False


def _share(process: psutil.Process) -> int:
    try:
        full = process.memory_full_info()
    except (psutil.Error, OSError):
        return 0
    return getattr(full, "pss", full.uss)  # Linux alone knows pss, where a page that n processes share counts 1/n
