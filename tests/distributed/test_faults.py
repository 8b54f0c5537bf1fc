"""What machines do to runs: a full disk, a disk that turns read-only, a rank that dies, a rank that stalls."""

import json
import os
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from dsmim.checkpoint.reading import STATE_FORMAT, check_files
from dsmim.cluster.placement import free_port
from tests.conftest import ROOT, environment, patience, run, tiny_recipe
from tests.distributed.runs import write_recipe

OWN_MOUNTS = ("unshare", "--mount") if os.geteuid() == 0 else ("unshare", "--mount", "--map-root-user")
CAN_MOUNT = subprocess.run([*OWN_MOUNTS, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode == 0

DISK = """
set -u
RUN=$1; shift
mkdir -p $RUN && mount -t tmpfs -o size=45m none $RUN || exit 90   # a checkpoint has 30 MB
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
    error = f"dsmim: error: {run_dir}/checkpoints/.partial_00000004: the checkpoint cannot be written"
    assert full.count(error) == full.count("dsmim: error:") == 1, full
    assert "No space left on device" in full and "status 1" in full, full
    assert _own_traceback(full) == "" and full.rstrip().endswith("step_00000002"), full
    assert check_files(tmp_path / "run.full/checkpoints/step_00000002") is None
    assert read_only.count("dsmim: error:") == 1 and f"Read-only file system: '{run_dir}" in read_only, read_only
    assert "status 1" in read_only and "untouched" in read_only and _own_traceback(read_only) == ""
    assert f"resumed from {run_dir}/checkpoints/step_00000002" in mended and "status 0" in mended, mended
    assert "step_00000006" in mended and ".partial" not in mended.split("status 0")[1]


def _own_traceback(said: str) -> str:
    """What Python says of an error that nobody caught; torchrun's own, when a rank has failed, comes after it."""
    return "".join(line for line in said.splitlines(keepends=True) if f'File "{ROOT}/dsmim' in line)


class Job:
    """Two ranks in long training, under torchrun, or each a process of its own, as srun starts them."""

    def __init__(self, folder: Path, shards: Path, torchrun: bool):
        folder.mkdir()
        changes = {"schedule": {"duration": {"steps": 2000}}, "checkpoint": {"every": {"steps": 2000}}}
        recipe = write_recipe(folder, shards, **changes)
        self.run_dir, self.log, port = folder / "run", folder / "log", free_port()
        words = ("train", recipe, "--run-dir", self.run_dir, "data.val=null", "data.workers=1",
                 f"engine.step_timeout_minutes={patience(0.1)}")  # fmt: skip
        if torchrun:
            launcher = ("torchrun", "--nproc-per-node", 2, "--master-port", port, "-m", "dsmim")
            self.processes = [self._start((*launcher, *words), {})]
        else:
            common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            ranks = [{"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
            self.processes = [self._start(("dsmim", *words), common | rank) for rank in ranks]

    def _start(self, words: tuple, env: dict[str, str]) -> psutil.Popen:
        with self.log.open("a") as log:
            return psutil.Popen([str(x) for x in words], cwd=ROOT, stdout=log, stderr=log, env=environment(**env))

    def wait_for_step(self, step: int) -> None:
        path, deadline = self.run_dir / "metrics.jsonl", time.monotonic() + patience(120)
        while not path.exists() or f'"step": {step},' not in path.read_text():
            running = all(process.poll() is None for process in self.processes)
            assert running and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def family(self) -> list[psutil.Process]:
        return [member for process in self.processes for member in (process, *process.children(recursive=True))]


def end(family: list[psutil.Process]) -> None:
    for process in family:
        if process.is_running():
            process.kill()


def test_a_rank_that_dies_and_one_that_stalls_end_their_jobs(tmp_path, shards):
    killed, stopped = Job(tmp_path / "killed", shards, True), Job(tmp_path / "stopped", shards, False)
    family: list[psutil.Process] = []
    try:
        for job in (killed, stopped):
            job.wait_for_step(2)
            family += job.family()
        victim = next(p for p in killed.processes[0].children() if p.environ().get("RANK") == "1")
        survivor, stalled = stopped.processes
        victim.kill()
        stalled.suspend()
        begun = time.monotonic()
        assert killed.processes[0].wait(patience(20)) != 0
        assert "exitcode  : 70" in killed.log.read_text()  # of rank 0, as torchrun reports it
        # Not answering for the step's 6 s; then it takes some seconds to see who does not.
        assert survivor.wait(patience(30)) == 70 and time.monotonic() - begun > patience(6)
        for job in (killed, stopped):
            said = job.log.read_text()
            assert said.count("dsmim: error:") == said.count("dsmim: error: rank 0: rank 1 on") == 1, said
            assert "has given no sign of life for" in said and ", last at: " in said, said
            assert "It was killed or stopped" in said and _own_traceback(said) == "", said
        stalled.resume()
        assert stalled.wait(patience(30)) == 70  # nor does it train on alone when it comes back
        assert "rank 1: rank 0's process, which keeps the rendezvous" in stopped.log.read_text()
        assert not psutil.wait_procs(family, timeout=patience(10))[1]  # no data worker is left behind
    finally:
        end(family)


def test_an_evaluation_waits_for_its_ranks_as_long_as_the_recipe_says(tmp_path, shards):
    """The other rank never comes. 3 seconds are given, where 10 minutes are the default."""
    checkpoint = tmp_path / "run/checkpoints/step_00000002"
    checkpoint.mkdir(parents=True)
    state = {"format": STATE_FORMAT, "recipe": tiny_recipe(shards, engine={"timeout_minutes": 60})}
    (checkpoint / "state.json").write_text(json.dumps(state))
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for words in ((tmp_path / "run",), (checkpoint,)):
        begun = time.monotonic()
        env = place | {"MASTER_PORT": str(free_port())}
        done = run("dsmim", "evaluate", *words, "engine.timeout_minutes=0.05", check=False, **env)
        assert done.returncode == 70 and "the 2 ranks did not all meet" in done.stderr, done.stderr
        assert time.monotonic() - begun < patience(60)


def test_an_error_that_nobody_expects_ends_its_process_at_once(tmp_path, shards):
    """Data workers outlive SIGTERM, and the interpreter's own end would wait for them."""
    recipe = write_recipe(tmp_path, shards)
    code = (
        "import sys; from dsmim.engine.zero import Engine; from dsmim.cli.main import main\n"
        "Engine.step = lambda *_: 1 / 0\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    words = ("train", recipe, "--run-dir", tmp_path / "run", "data.val=null", "data.workers=2")
    done = run("python", "-c", code, *words, check=False, silence=60)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr
