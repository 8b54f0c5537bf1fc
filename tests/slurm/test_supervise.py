"""slurm/supervise.sh alone, with commands that only sleep and exit: what becomes of the job."""

from __future__ import annotations

import pytest

from tests.slurm.conftest import TEMPLATES

TWO = ("--nodes=2", "--ntasks-per-node=1", "--open-mode=append", "--requeue")
# Of two tasks that exit alike the slower one may be ended with 143 before it does. Ranks hold out; see docs/slurm.md.
ALONE = "--nodes=1"


@pytest.fixture
def command(user):
    """Submit a job that supervises srun's `bash -c TEXT`."""
    script = user.home / "supervised.sbatch"
    script.write_text(
        f'#!/bin/bash\nsource {TEMPLATES}/supervise.sh\nsupervise srun --kill-on-bad-exit=1 bash -c "$1"\n'
    )

    def submit(text: str, *options: str, **env: str) -> int:
        output = f"--output={user.home}/%j.out"
        return user.cluster.sbatch(*TWO, *options, output, script, text, cwd=user.home, **env)

    return submit


def test_exit_codes_decide(user, command):
    """All jobs at once: a failed task fails the job, a lost rank and an orderly stop requeue it, within limits."""
    cluster = user.cluster
    jobs = {
        # Not before the other task runs: one that is only starting may miss the signal, and is killed later (137).
        "fails": command(
            "[ $SLURM_PROCID = 0 ] && { touch running; exec sleep 200; }\n"
            "until [ -e running ]; do sleep 0.1; done; exit 7"
        ),
        "wrong": command("exit 1", ALONE),
        "stopped": command("exit 75", ALONE),
        "may not": command("exit 75", ALONE, "--no-requeue"),
        "lost": command("exit 70", ALONE),
        "killed": command("kill -9 $$", ALONE),
        "given up": command("exit 70", ALONE, DSMIM_RESTARTS="0"),
    }
    for name in ("stopped", "lost", "killed"):
        cluster.requeued(jobs[name], timeout=30)
        assert "requeued" in user.said(jobs[name])
        cluster.run("scancel", jobs[name])
    ended = {name: cluster.wait(jobs[name], timeout=30) for name in ("fails", "wrong", "may not", "given up")}
    assert all(state["JobState"] == "FAILED" for state in ended.values())
    assert ended["fails"]["ExitCode"] == "143:0"  # srun's: the highest of the failed task's and the ended one's
    assert [ended[name]["ExitCode"] for name in ("wrong", "may not", "given up")] == ["1:0", "75:0", "70:0"]
    assert "to go on, submit the same command again" in user.said(jobs["may not"])
    assert "after 0 restarts: given up" in user.said(jobs["given up"])


def test_a_cancelled_job_stays_cancelled(user, command):
    """Its ranks save and leave with 75, and Slurm would requeue it if it were asked to."""
    job = command("trap 'exit 75' TERM USR1; echo ready; while :; do sleep 0.1; done")
    user.until_said(job, "ready", timeout=30)
    user.cluster.run("scancel", job)
    state = user.cluster.wait(job, timeout=30)
    user.cluster.until(lambda: "not requeued" in user.said(job), 30, "the last words")
    assert state["JobState"] == "CANCELLED" and user.cluster.job(job)["Restarts"] == "0"


def test_a_signal_before_anybody_listens_requeues(user, command):
    job = command("echo ready; sleep 200")
    user.until_said(job, "ready", timeout=30)
    user.cluster.run("scancel", "--signal=USR2", "--batch", job)
    user.cluster.requeued(job, timeout=30)
    assert "ended by the request to stop" in user.said(job)
    user.cluster.run("scancel", job)


def test_in_an_array_one_task_is_requeued_and_told_its_end(user, command):
    asked = "from dsmim.cluster.slurm import end_of_job as end; import os; print('asked', end(os.environ))"
    text = f'''[ $SLURM_ARRAY_TASK_ID = 1 ] && exit 75
        echo end $SLURM_JOB_END_TIME; env -u SLURM_JOB_END_TIME SQUEUE_FORMAT=%i python -c "{asked}"'''
    job = command(text, ALONE, "--array=0-2", "--time=60")
    tasks = [f"{job}_{number}" for number in range(3)]
    user.cluster.requeued(tasks[1], timeout=30)
    states = [user.cluster.wait(task, timeout=30) for task in (tasks[0], tasks[2])]
    assert [state["JobState"] for state in states] == ["COMPLETED"] * 2
    assert [user.cluster.job(task)["Restarts"] for task in tasks] == ["0", "1", "0"]
    said = user.said(int(states[0]["JobId"]))
    told = user.cluster.run("date", "-d", states[0]["StartTime"], "+%s").stdout
    assert f"end {int(told) + 3600}\nasked {int(told) + 3600}.0\n" in said
    user.cluster.run("scancel", job)


def test_a_dependent_job_waits_through_a_requeue(user, command):
    job = command("exit $(( ${SLURM_RESTART_COUNT:-0} ? 0 : 75 ))", ALONE)
    after = command("true", f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes")
    user.cluster.requeued(job, timeout=30)
    assert user.cluster.job(after)["Reason"] == "Dependency"
    user.cluster.start_again(job)
    user.completed(job, timeout=30)
    user.completed(after, timeout=30)
    assert user.cluster.job(after)["Restarts"] == "0"


def test_templates_say_where_their_other_half_is_missing(user):
    job = user.sbatch("pretrain.sbatch", "r.yaml", DSMIM_SLURM="/nowhere")
    state = user.cluster.wait(job, timeout=30)
    assert state["ExitCode"] == "1:0" and "no /nowhere/supervise.sh: submit from dsmim's folder" in user.said(job)
