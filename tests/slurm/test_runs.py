"""Training on two nodes of a real Slurm: every launcher, and a run that is stopped in every way and resumes."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, patience
from tests.distributed.runs import metrics, read_weights
from tests.slurm.conftest import STEPS

LAST = f"step {STEPS}/{STEPS}"


def assert_same_run(one: Path, other: Path) -> None:
    """Check that two runs have the same weights, bit for bit, and the same line of metrics for every step."""
    left, right = read_weights(one), read_weights(other)
    assert left.keys() == right.keys() and len(left) > 100
    for name, value in left.items():
        assert value.numpy().tobytes() == right[name].numpy().tobytes(), name
    ours, theirs = metrics(one), metrics(other)
    assert [(line["step"], *line) for line in ours] == [(line["step"], *line) for line in theirs]
    assert ours == theirs and len(ours) > STEPS


@pytest.fixture(scope="module")
def straight(user) -> Path:
    """An uninterrupted run, submitted by `dsmim submit`. The other runs are compared with it.

    Its ranks see neither Slurm's commands, as in a container, nor the environment of the user, only the profile's.
    """
    inside = user.home / "inside"
    inside.mkdir()
    (inside / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (inside / "python").chmod(0o755)
    (user.home / "profile.yaml").write_text(
        f"cpus_per_task: 1\npartition: normal\nsetup: ['test -d {user.home}']\n"
        f"env: {{WORD: 'two words', PYTHONPATH: {ROOT}, OMP_NUM_THREADS: 1, DS_ACCELERATOR: cpu}}\n"
        f"container: env PATH={inside}\nsbatch: [--comment=straight, --export=NONE]\nsrun: [--label]\n"
    )
    words = ("dsmim", "submit", "r.yaml", "--nodes", 2, "--gpus-per-node", 1, "--time", round(patience(10)),
             "--profile", "profile.yaml")  # fmt: skip
    done = user.cluster.run(*words, "--run-dir", "straight", "--set", "log.every=1", cwd=user.home)
    job = int(done.stdout)
    user.cluster.wait(job, "RUNNING", "COMPLETED")
    state = user.cluster.job(job)
    assert (state["NumNodes"], state["NumTasks"], state["CPUs/Task"]) == ("2", "2", "1") and state["Requeue"] == "1"
    assert state["TresPerNode"] == "gres:gpu:1" and state["Comment"] == "straight" and state["JobName"] == "tiny"
    state = user.cluster.wait(job)
    output = (user.home / f"straight/slurm/tiny-{job}.out").read_text()
    assert state["JobState"] == "COMPLETED", output
    assert "2 ranks by srun" in output and "ZeRO stage 3" in output and "\n0: step 1/" in output  # --label
    return user.home / "straight"


def test_deepspeed_and_mpirun_stop_on_request_requeue_and_finish_alike(user, straight):
    jobs = {name: user.sbatch(f"{name}.sbatch", "r.yaml", "--run-dir", name) for name in
            ("pretrain_deepspeed", "pretrain_mpirun")}  # fmt: skip
    for job in jobs.values():
        user.wait_for_output(job, "step 2/")
        user.cluster.run("scancel", "--signal=USR1", "--batch", job)  # what --signal=B:USR1@300 does
    for job in jobs.values():
        user.cluster.start_again(job)
    for name, job in jobs.items():
        user.completed(job)
        output = user.output(job)
        assert f"2 ranks by {'mpirun' if 'mpirun' in name else 'srun'}" in output and "ZeRO stage 3" in output
        assert "everything saved" in output and "resumed from" in output and LAST in output
        assert output.count("requeued") == 1 and user.cluster.job(job)["Restarts"] == "1"
        assert_same_run(straight, user.home / name)


def test_signal_preemption_and_power_failure_change_nothing(user, straight):
    """One job that is started four times."""
    cluster = user.cluster
    job = user.sbatch("pretrain.sbatch", "r.yaml", "--run-dir", "srun", "checkpoint.every.steps=2")
    user.wait_for_output(job, "step 2/")
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    cluster.start_again(job, times=1)
    assert "got SIGUSR1" in user.output(job) and "stopped on request, everything is saved" in user.output(job)

    _until_resumed(user, job, times=1)
    urgent = cluster.sbatch("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    cluster.wait(urgent, timeout=90)
    cluster.start_again(job, times=2)
    assert user.output(job).count("got SIGUSR1") == 2

    _until_resumed(user, job, times=2)
    requeues = user.output(job).count("requeued")
    cluster.power_off(2)
    cluster.requeued(job, times=3)
    cluster.power_on(2)
    cluster.start_again(job, times=3)
    assert user.output(job).count("requeued") == requeues  # Slurm itself requeued it, for NODE_FAIL
    assert "due to failure of node node2" in cluster.log()

    user.completed(job)
    assert cluster.job(job)["Restarts"] == "3" and LAST in user.output(job)
    assert_same_run(straight, user.home / "srun")


def _until_resumed(user, job: int, times: int) -> None:
    """Wait until the job has made a step since it was started again."""

    def stepped() -> bool:
        resumed = "".join(user.output(job).split("resumed from")[times:])
        return re.search(r"\nstep \d+/\d+ \| loss", resumed) is not None

    user.cluster.until(stepped, 180, f"job {job} to make a step")


def test_tasks_that_each_see_a_world_of_one_end_in_an_error(user):
    """Under `srun --mpi=none` mpi4py silently gives every task rank 0 of 1. dsmim uses Slurm's variables there.

    If dsmim is made to use MPI, it must stop: otherwise both tasks would train the same run.
    """
    script = user.home / "alone.sbatch"
    script.write_text(
        "#!/bin/bash\n"
        "srun --mpi=none python -c 'from mpi4py.MPI import COMM_WORLD as w; print(\"rank\", w.rank, w.size)'\n"
        "export OMPI_COMM_WORLD_SIZE=2\n"
        "srun --mpi=none --kill-on-bad-exit=1 python -m dsmim train r.yaml --run-dir alone\n"
    )
    job = user.cluster.sbatch("--nodes=2", "--ntasks-per-node=1", f"--output={user.home}/%j.out", script, cwd=user.home)
    state, output = user.cluster.wait(job), user.output(job)
    assert output.count("rank 0 1\n") == 2, output
    assert "mpirun announces 2 ranks but mpi4py sees a world of 1" in output
    assert state["JobState"] == "FAILED" and state["ExitCode"] != "0:0"
    assert not (user.home / "alone").exists()
