"""Memory and open files: what a rank uses, what its node has left, and when a warning is given."""

import multiprocessing
import os
import resource
import signal
from pathlib import Path

import psutil
import pytest

from dsmim.cluster.placement import detect
from dsmim.health import host
from dsmim.health.host import HostMonitor, describe, merge
from dsmim.health.memory_limit import memory_limit
from tests.conftest import patience, run

PLACE = detect({})
V1 = "4:memory:/slurm/uid_1000/job_42/step_0\n3:cpuset:/\n0::/\n"
V2 = "0::/system.slice/slurmstepd.scope/job_42/step_0/user/task_0\n"


def group(folder: Path, limit: int | str, usage: int, stat: dict[str, int], version: int) -> None:
    """Write the files of a memory control group, as the kernel shows them."""
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, usage), strict=True):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text("".join(f"{key} {value}\n" for key, value in stat.items()))


def put_in_groups(root: Path, text: str) -> None:
    """Say that this process is in these control groups."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(text)


def test_control_groups_of_version_1(tmp_path):
    put_in_groups(tmp_path, V1)
    job = tmp_path / "sys/fs/cgroup/memory/slurm/uid_1000/job_42"
    unlimited = 9223372036854771712  # what the kernel shows for no limit
    group(job / "step_0", unlimited, 700, {}, version=1)
    stat = {"cache": 300, "inactive_file": 1, "total_inactive_file": 150, "total_active_file": 50, "total_shmem": 100}
    group(job, 1000, 900, stat, version=1)
    limit = memory_limit({"SLURM_MEM_PER_NODE": "1"}, tmp_path)  # the limit that is set, not the one that was requested
    assert (limit.total, limit.left) == (1000, 300)  # shared memory cannot be freed, the rest of the cache can
    assert limit.source == f"control group {job}"


def test_control_groups_of_version_2(tmp_path):
    put_in_groups(tmp_path, V2)
    scope = tmp_path / "sys/fs/cgroup/system.slice/slurmstepd.scope"
    group(scope / "job_42/step_0/user/task_0", "max", 700, {}, version=2)
    group(scope / "job_42/step_0", 800, 780, {"file": 400, "inactive_file": 300, "slab_reclaimable": 20}, version=2)
    group(scope / "job_42", 2000, 1990, {"inactive_file": 300}, version=2)
    limit = memory_limit({}, tmp_path)
    assert (limit.total, limit.left) == (2000, 310)  # 15 % are left here, 42 % of the step's 800
    group(scope / "job_42", 2000, 2100, {}, version=2)
    assert memory_limit({}, tmp_path).left == 0


def test_a_container_that_shows_the_hosts_path(tmp_path):
    put_in_groups(tmp_path, "4:memory:/docker/1234\n")
    group(tmp_path / "sys/fs/cgroup/memory", 4096, 3996, {}, version=1)
    assert (memory_limit({}, tmp_path).total, memory_limit({}, tmp_path).left) == (4096, 100)


def test_without_limits_the_machines_memory_counts(tmp_path):
    machine = psutil.virtual_memory()
    assert memory_limit({}, tmp_path).total == machine.total
    assert memory_limit({"SLURM_MEM_PER_NODE": "0"}, tmp_path).total == machine.total  # all of the node
    assert memory_limit({"SLURM_MEM_PER_CPU": "100", "SLURM_CPUS_ON_NODE": "3"}, tmp_path).total == 300 * 2**20


JOB = """
import os, sys, multiprocessing
from pathlib import Path
from dsmim.health import memory_limit
from dsmim.health.host import HostMonitor
from dsmim.cluster.placement import detect

memory_limit._groups = lambda root: []  # this machine's own limits are not what is tested
block = bytearray(os.urandom(2**20)) * 250
shared = multiprocessing.get_context("fork").Process(target=input)  # shares all of it, at no cost
shared.start()
monitor = HostMonitor(detect({}), lambda text: print(text, flush=True), low_memory=0.3)
monitor.warn_if_low()
print("enough")
more = bytearray(os.urandom(2**20)) * 200
monitor.warn_if_low()
monitor.warn_if_low()
del more
monitor.warn_if_low()
more = bytearray(os.urandom(2**20)) * 200
monitor.warn_if_low()
shared.terminate()
"""


def test_a_job_that_nears_its_requested_memory_warns_once_each_time():
    env = {"SLURM_MEM_PER_NODE": "600", "SLURM_JOB_ID": f"7{os.getpid()}", "RANK": "3"}
    lines = run("python", "-c", JOB, **env).stdout.splitlines()
    assert lines[0] == "enough" and len(lines) == 3, lines
    for line in lines[1:]:
        assert "of 0.6 GB of memory are left (requested from Slurm)" in line and "Fewer data.workers" in line
        assert " of rank 3 0.4 GB" in line or "Largest: " in line  # others on the machine may be larger


def open_files(count: int) -> list:
    return [os.fdopen(os.open(__file__, os.O_RDONLY)) for _ in range(count)]


def hold_memory(ready) -> None:
    held = bytearray(100_000_000)
    ready.set()
    signal.pause()
    del held


def test_sample_and_merge():
    monitor = HostMonitor(PLACE, print, 0.05)
    before = monitor.sample()
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    worker = context.Process(target=hold_memory, args=(ready,))
    worker.start()
    assert ready.wait(patience(30))
    held = open_files(7)
    sample = monitor.sample()
    worker.kill()
    worker.join()
    assert sample["open_files"] >= before["open_files"] + len(held)
    assert sample["workers"] == before["workers"] + 1 and sample["largest_worker_bytes"] >= 100_000_000
    assert 0 < sample["left_bytes"] < sample["limit_bytes"] and sample["rank_bytes"] > 20_000_000
    other = sample | {"rank": 5, "host": "node9", "rank_bytes": 10**12, "left_bytes": 1, "open_files": 1}
    merged = merge([sample, other])
    assert merged["host_rank_gb"] == 1000 and merged["host_rank_gb_of"] == merged["host_memory_left_of"] == 5
    assert merged["host_ranks_gb_sum"] == pytest.approx(1000 + sample["rank_bytes"] / 1e9)
    assert merged["host_workers"] == 2 * sample["workers"] and merged["host_open_files_of"] == 0
    assert all(isinstance(value, (int, float)) for value in merged.values())  # TensorBoard takes no text
    assert "a rank up to 1000.0 GB (rank 5 on node9)" in describe([sample, other])


def test_one_warning_when_few_files_are_left(monkeypatch):
    warnings = []
    monitor = HostMonitor(PLACE, warnings.append, low_memory=0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = monitor.sample()["open_files"]  # hundreds, if other tests in this process left some open
    spare = 60 + opened // 4
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + spare, hard))
    try:
        monitor.warn_if_low()
        assert not warnings
        held = open_files(spare - 2)
        monitor.warn_if_low()
        monitor.warn_if_low()
        assert len(warnings) == 1 and f"its limit is {opened + spare}: raise it (ulimit -n)" in warnings[0]
        clock = host.time.monotonic() + host.AGAIN + 1
        monkeypatch.setattr(host.time, "monotonic", lambda: clock)
        monitor.warn_if_low()
        assert len(warnings) == 2
        del held
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
