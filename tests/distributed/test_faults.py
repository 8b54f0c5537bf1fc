"""What machines do to runs: a full disk, a disk that turns read-only, a rank that dies, a rank that stalls."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from dsmim.engine.checkpoint import check_files
from dsmim.engine.placement import free_port
from tests.conftest import ROOT, environment, run
from tests.distributed.test_runs import write_recipe

OWN_MOUNTS = ("unshare", "--mount") if os.geteuid() == 0 else ("unshare", "--mount", "--map-root-user")
CAN_MOUNT = subprocess.run([*OWN_MOUNTS, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode == 0

DISK = """
set -u
RUN=$1; shift
mkdir -p $RUN && mount -t tmpfs -o size=60m none $RUN || exit 90   # room for one checkpoint
echo == full; "$@"; echo status $?; ls -a $RUN/checkpoints; cp -r $RUN $RUN.full
mount -o remount,size=500m,ro $RUN || exit 91
echo == read-only; "$@"; echo status $?; diff -r $RUN $RUN.full && echo untouched
mount -o remount,rw $RUN || exit 92
echo == mended; "$@"; echo status $?; ls -a $RUN/checkpoints
"""


@pytest.mark.skipif(not CAN_MOUNT, reason="needs a mount namespace of its own")
def test_a_disk_that_is_full_and_then_read_only(tmp_path, shards):
    recipe = write_recipe(tmp_path, shards, validation={"every": {"steps": 6}})
    run_dir = tmp_path / "run"
    train = ("torchrun", "--nproc-per-node", 2, "--master-port", free_port(), "-m", "dsmim", "train", recipe)
    done = run(*OWN_MOUNTS, "bash", "-c", f"exec 2>&1\n{DISK}", "bash", run_dir, *train, "--run-dir", run_dir)
    _, full, read_only, mended = done.stdout.split("== ")
    error = f"dsmim: error: {run_dir}/checkpoints/.partial_00000004: cannot be written; the last checkpoint stands."
    assert full.count(error) == 1 and "No space left on device" in full and "status 1" in full, full
    assert _own_traceback(full) == "" and full.rstrip().endswith("step_00000002"), full
    assert check_files(tmp_path / "run.full/checkpoints/step_00000002") is None
    assert read_only.count("dsmim: error:") == 1 and f"Read-only file system: '{run_dir}" in read_only, read_only
    assert "status 1" in read_only and "untouched" in read_only and _own_traceback(read_only) == ""
    assert f"resumed from {run_dir}/checkpoints/step_00000002" in mended and "status 0" in mended, mended
    assert "step_00000006" in mended and ".partial" not in mended.split("status 0")[1]


def _own_traceback(said: str) -> str:
    """What Python says of an error that nobody caught; torchrun's own, when a rank has failed, comes after it."""
    return "".join(line for line in said.splitlines(keepends=True) if f'File "{ROOT}/dsmim' in line)


class Launch:
    """Two ranks under torchrun, in long training."""

    def __init__(self, folder: Path, shards: Path):
        folder.mkdir()
        recipe = write_recipe(folder, shards, schedule={"duration": {"steps": 2000}})
        self.run_dir, self.log = folder / "run", folder / "log"
        words = ("-m", "dsmim", "train", recipe, "--run-dir", self.run_dir, "data.val=null", "data.workers=1",
                 "checkpoint.every.steps=2000", "engine.step_timeout_minutes=0.1")  # fmt: skip
        command = ("torchrun", "--nproc-per-node", 2, "--master-port", free_port(), *words)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [str(word) for word in command], cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
                env=environment(TORCH_ELASTIC_SHUTDOWN_TIMEOUT="2"),  # torchrun gives a stopped rank half a minute
            )  # fmt: skip

    def rank_after(self, step: int, rank: int) -> psutil.Process:
        """The process of a rank, once so many steps are done."""
        deadline = time.monotonic() + 120
        while self.step() < step:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)
        children = psutil.Process(self.process.pid).children()
        return next(child for child in children if child.environ().get("RANK") == str(rank))

    def step(self) -> int:
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)

    def end(self) -> None:
        for process in [*psutil.Process().children(recursive=True)]:
            if self.process.pid in (process.pid, process.ppid()):
                process.kill()
        self.process.wait()


def test_a_rank_that_dies_and_one_that_stalls_end_their_jobs(tmp_path, shards):
    launches = {name: Launch(tmp_path / name, shards) for name in ("killed", "stopped")}
    try:
        family, begun = [], {}
        for name, launch in launches.items():
            rank = launch.rank_after(2, 1)
            family += [rank, *rank.children(recursive=True), *psutil.Process(launch.process.pid).children()]
            rank.send_signal({"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}[name])
            begun[name] = time.monotonic()
        # Not answering for 6 s, some seconds to see who does not, and torchrun's for ending the others.
        for name, limit in (("killed", 25), ("stopped", 35)):
            assert launches[name].process.wait(begun[name] + limit - time.monotonic()) != 0
            said = launches[name].log.read_text()
            assert said.count("dsmim: error: rank 0: rank 1 on") == 1, said
            assert "gives no sign of life" in said and "last at: " in said and _own_traceback(said) == "", said
            assert "exitcode  : 70" in said  # of rank 0, as torchrun reports it
        assert not psutil.wait_procs(family, timeout=10)[1]  # nor is a data worker left behind
    finally:
        for launch in launches.values():
            launch.end()
