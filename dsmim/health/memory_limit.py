"""How much memory this process's job may use on its node, and how much of that is left.

The narrowest of what holds: the machine's memory, the control groups that the process is in (version 1 or 2, as Slurm
and containers set them up), else what Slurm was asked for. Page cache that the kernel would give up is not in use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil


@dataclass(frozen=True)
class Limit:
    """Bytes, and who allows them."""

    total: int
    left: int
    source: str


@dataclass(frozen=True)
class _Version:
    """Where a version of control groups keeps what we read."""

    mount: str
    limit: str
    usage: str
    prefix: str
    """In front of memory.stat's names: version 1 has the group's own figures, and those of all below it."""


_V1 = _Version("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
_V2 = _Version("sys/fs/cgroup", "memory.max", "memory.current", "")
_CACHE = ("inactive_file", "active_file", "slab_reclaimable")  # not tmpfs or shared memory, which cannot be given up


def memory_limit(env: Mapping[str, str], root: Path = Path("/")) -> Limit:
    """The limit that is nearest. env: the process's environment; root: where /proc and /sys are found."""
    machine = psutil.virtual_memory()
    limits = [Limit(machine.total, machine.available, "the machine's memory")]
    limits += [limit for limit in _groups(root) if limit.total < machine.total]
    if len(limits) == 1 and (asked := _asked_of_slurm(env)) is not None and asked < machine.total:
        limits.append(Limit(asked, min(machine.available, asked - _used_by_job(env)), "asked of Slurm"))
    nearest = min(limits, key=lambda limit: limit.left / limit.total)
    return Limit(nearest.total, max(0, nearest.left), nearest.source)


def _groups(root: Path) -> Iterator[Limit]:
    """Every group with a limit, from the process's own up to the outermost."""
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
    """In a container the path may be the host's, of which only the mount itself is to be seen."""
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


def _asked_of_slurm(env: Mapping[str, str]) -> int | None:
    """Bytes per node; 0 asks for all of a node, which is no limit."""
    if per_node := int(env.get("SLURM_MEM_PER_NODE") or 0):
        return per_node * 2**20
    per_cpu, cpus = (int(env.get(name) or 0) for name in ("SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"))
    return per_cpu * cpus * 2**20 or None


def _used_by_job(env: Mapping[str, str]) -> int:
    """Bytes of the job's processes on this node, pages that several share counted once."""
    return sum(_share(process) for process in psutil.process_iter() if _in_job(process, env))


def _in_job(process: psutil.Process, env: Mapping[str, str]) -> bool:
    try:
        return process.environ().get("SLURM_JOB_ID") == env.get("SLURM_JOB_ID")
    except (psutil.Error, OSError):  # somebody else's
        return False


def _share(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except (psutil.Error, OSError):
        return 0
