"""Training on two nodes of a real Slurm: every launcher, and a run that is stopped in every way and goes on."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from tests.distributed.runs import metrics, read_weights
from tests.slurm.conftest import STEPS

LAST = f"step {STEPS}/{STEPS}"


def assert_same_run(one: Path, other: Path) -> None:
    """The same weights, bit for bit, and the same line of the log for every step."""
    left, right = read_weights(one), read_weights(other)
    assert left.keys() == right.keys() and len(left) > 100
    for name, value in left.items():
        assert value.numpy().tobytes() == right[name].numpy().tobytes(), name
    ours, theirs = metrics(one), metrics(other)
    assert [(line["step"], *line) for line in ours] == [(line["step"], *line) for line in theirs]
    assert ours == theirs and len(ours) > STEPS


@pytest.fixture(scope="module")
def straight(user) -> Path:
    """A run that nothing disturbs, submitted by `dsmim submit`: what the others are compared with."""
    (user.home / "profile.yaml").write_text(
        f"cpus_per_task: 1\npartition: normal\nsetup: ['test -d {user.home}']\nenv: {{WORD: 'two words'}}\n"
        "sbatch: [--comment=straight]\nsrun: [--label]\n"
    )
    words = ("dsmim", "submit", "r.yaml", "--nodes", 2, "--gpus-per-node", 1, "--time", 10, "--profile", "profile.yaml")
    told = user.cluster.run(*words, "--run-dir", "straight", "--set", "log.every=1", cwd=user.home)
    job = int(told.stdout)
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
        user.until_said(job, "step 2/")
        user.cluster.run("scancel", "--signal=USR1", "--batch", job)  # what --signal=B:USR1@300 does
    for job in jobs.values():
        user.cluster.start_again(job)
    for name, job in jobs.items():
        user.completed(job)
        said = user.said(job)
        assert f"2 ranks by {'mpirun' if 'mpirun' in name else 'srun'}" in said and "ZeRO stage 3" in said
        assert "everything saved; start again to go on" in said and "resumed from" in said and LAST in said
        assert said.count("requeued") == 1 and user.cluster.job(job)["Restarts"] == "1"
        assert_same_run(straight, user.home / name)


def test_signal_preemption_and_power_failure_change_nothing(user, straight):
    """One job, four lives."""
    cluster = user.cluster
    job = user.sbatch("pretrain.sbatch", "r.yaml", "--run-dir", "srun", "checkpoint.every.steps=2")
    user.until_said(job, "step 2/")
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    cluster.start_again(job, times=1)
    assert "got SIGUSR1" in user.said(job) and "stopped on request, everything is saved" in user.said(job)

    _until_resumed(user, job, times=1)
    urgent = cluster.sbatch("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    cluster.wait(urgent, timeout=90)
    cluster.start_again(job, times=2)
    assert user.said(job).count("got SIGUSR1") == 2

    _until_resumed(user, job, times=2)
    requeues = user.said(job).count("requeued")
    cluster.power_off(2)
    cluster.requeued(job, times=3)
    cluster.power_on(2)
    cluster.start_again(job, times=3)
    assert user.said(job).count("requeued") == requeues  # Slurm did that, for NODE_FAIL
    assert "due to failure of node node2" in cluster.log()

    user.completed(job)
    assert cluster.job(job)["Restarts"] == "3" and LAST in user.said(job)
    assert_same_run(straight, user.home / "srun")


def _until_resumed(user, job: int, times: int) -> None:
    """Until this life has made a step of its own."""
    deadline = time.monotonic() + 180
    while not re.search(r"\nstep \d+/\d+ \| loss", "".join(user.said(job).split("resumed from")[times:])):
        assert time.monotonic() < deadline, user.said(job)[-3000:]
        time.sleep(0.1)


def test_tasks_that_each_see_a_world_of_one_end_in_an_error(user):
    """Under `srun --mpi=none` mpi4py gives every task rank 0 of 1, silently. dsmim goes by Slurm's variables there;
    told to go by MPI it would train the same run twice."""
    script = user.home / "alone.sbatch"
    script.write_text(
        "#!/bin/bash\n"
        "srun --mpi=none python -c 'from mpi4py.MPI import COMM_WORLD as w; print(\"rank\", w.rank, w.size)'\n"
        "export OMPI_COMM_WORLD_SIZE=2\n"
        "srun --mpi=none --kill-on-bad-exit=1 python -m dsmim train r.yaml --run-dir alone\n"
    )
    job = user.cluster.sbatch("--nodes=2", "--ntasks-per-node=1", f"--output={user.home}/%j.out", script, cwd=user.home)
    state, said = user.cluster.wait(job), user.said(job)
    assert said.count("rank 0 1\n") == 2, said
    assert "mpirun announces 2 ranks but mpi4py sees a world of 1" in said
    assert state["JobState"] == "FAILED" and state["ExitCode"] != "0:0"
    assert not (user.home / "alone").exists()
