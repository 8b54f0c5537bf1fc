"""slurm/supervise.sh alone, with commands that only sleep and exit: is the job requeued, failed or cancelled?"""

from __future__ import annotations

import re

import pytest

from dsmim.cluster.placement import first_host
from tests.cluster.test_placement import HOSTS
from tests.slurm.conftest import TEMPLATES

TWO = ("--nodes=2", "--ntasks-per-node=1", "--open-mode=append", "--requeue")
# With two tasks that exit with the same code, Slurm may end the slower one (143) before it exits. Ranks survive a
# SIGTERM; see docs/slurm.md.
ALONE = "--nodes=1"


@pytest.fixture
def command(user):
    """Submit a job that supervises `srun bash -c TEXT`, as one of the run directory `run` if it has one."""
    script = user.home / "supervised.sbatch"
    script.write_text(
        f"#!/bin/bash\nset -u\nexport WORD='of the script'\nsource {TEMPLATES}/supervise.sh\n"
        '[ -z "${2:-}" ] || follow r.yaml --run-dir="$2"\n'
        'supervise srun --kill-on-bad-exit=1 bash -c "$1"\n'
    )

    def submit(text: str, *options: str, run: str = "", **env: str) -> int:
        output = f"--output={user.home}/%j.out"
        return user.cluster.sbatch(*TWO, *options, output, script, text, run, cwd=user.home, **env)

    return submit


def test_the_exit_code_decides(user, command):
    """All jobs at once. A failed task fails the job; a lost rank and a stop on request requeue it, within limits."""
    cluster = user.cluster
    jobs = {
        # Task 1 fails once task 0 runs: a task that is just starting may miss the signal, and is killed later (137).
        "fails": command(
            "[ $SLURM_PROCID = 0 ] && { touch running; exec sleep 200; }\n"
            "until [ -e running ]; do sleep 0.1; done; exit 7"
        ),
        "wrong": command("exit 1", ALONE),
        "stopped": command("exit 75", ALONE),
        "may not": command("exit 75", ALONE, "--no-requeue"),
        "lost": command("exit 70", ALONE),
        "killed": command("kill -9 $$", ALONE),
        "not again": command("exit 70", ALONE, DSMIM_RESTARTS="0"),
    }
    for name in ("stopped", "lost", "killed"):
        cluster.requeued(jobs[name], timeout=30)
        assert "requeued" in user.output(jobs[name])
        cluster.run("scancel", jobs[name])
    ended = {name: cluster.wait(jobs[name], timeout=30) for name in ("fails", "wrong", "may not", "not again")}
    assert all(state["JobState"] == "FAILED" for state in ended.values())
    # srun returns the higher code: 7 of the failed task, 143 of the one that Slurm ended.
    assert ended["fails"]["ExitCode"] == "143:0"
    assert [ended[name]["ExitCode"] for name in ("wrong", "may not", "not again")] == ["1:0", "75:0", "70:0"]
    assert "to resume, submit the same command again" in user.output(jobs["may not"])
    assert "after 0 restarts without a new checkpoint: not requeued again" in user.output(jobs["not again"])


def test_restarts_are_limited_only_while_no_new_checkpoint_is_saved(user, command):
    """Six sessions of a job that may be restarted twice without progress. The third one saves a checkpoint."""
    run = user.home / "limited"
    session = f"""
        case ${{SLURM_RESTART_COUNT:-0}} in
            0) mkdir -p {run}/checkpoints; exit 76 ;;
            1) exit 70 ;;
            2) printf step_00000009 >{run}/checkpoints/latest; exit 75 ;;
            3) kill -9 $$ ;;
            *) exit 75 ;;
        esac"""
    job = command(session, ALONE, run=run, DSMIM_RESTARTS="2")
    for times in range(1, 6):
        user.cluster.start_again(job, times)
    state, output = user.cluster.wait(job, timeout=60), user.output(job)
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", "75:0", "5"), output
    assert len(re.findall(f"job {job}: requeued\n", output)) == 5
    assert output.count("after 2 restarts without a new checkpoint: not requeued again") == 1
    assert (run / "slurm/restarts").read_text() == f"{job} step_00000009 2\n"
    for code, reason in ((76, "asked to stop before the first step"), (70, "a rank was lost (exit code 70)")):
        assert output.count(f"job {job}: {reason}\n") == 1, (code, output)


def test_ranks_get_the_environment_of_the_batch_shell_from_a_site_that_exports_none(user, command):
    job = command('echo "word $WORD"', ALONE, "--export=NONE")
    user.completed(job, timeout=60)
    assert "word of the script\n" in user.output(job)


def test_the_first_host_is_the_one_that_slurm_names(user):
    for nodes, first in HOSTS:
        if first is not None:
            names = user.cluster.run("scontrol", "show", "hostnames", nodes).stdout.split()
            assert names[0] == first == first_host(nodes)


def test_a_cancelled_job_stays_cancelled(user, command):
    """Its ranks save and end with 75. Slurm would requeue it, but is not asked to."""
    job = command("trap 'exit 75' TERM USR1; echo ready; while :; do sleep 0.1; done")
    user.wait_for_output(job, "ready", timeout=30)
    user.cluster.run("scancel", job)
    state = user.cluster.wait(job, timeout=30)
    user.cluster.until(lambda: "not requeued" in user.output(job), 30, "the message about it")
    assert state["JobState"] == "CANCELLED" and user.cluster.job(job)["Restarts"] == "0"


def test_a_signal_that_no_rank_handles_requeues(user, command):
    job = command("echo ready; sleep 200")
    user.wait_for_output(job, "ready", timeout=30)
    user.cluster.run("scancel", "--signal=USR2", "--batch", job)
    user.cluster.requeued(job, timeout=30)
    assert "ended by the request to stop" in user.output(job)
    user.cluster.run("scancel", job)


def test_in_an_array_one_task_is_requeued_and_knows_its_end(user, command):
    asked = "from dsmim.cluster.slurm import end_of_job as end; import os; print('asked', end(os.environ))"
    text = f'''[ $SLURM_ARRAY_TASK_ID = 1 ] && exit 75
        echo end $SLURM_JOB_END_TIME; env -u SLURM_JOB_END_TIME SQUEUE_FORMAT=%i python -c "{asked}"'''
    job = command(text, ALONE, "--array=0-2", "--time=60")
    tasks = [f"{job}_{number}" for number in range(3)]
    user.cluster.requeued(tasks[1], timeout=30)
    states = [user.cluster.wait(task, timeout=30) for task in (tasks[0], tasks[2])]
    assert [state["JobState"] for state in states] == ["COMPLETED"] * 2
    assert [user.cluster.job(task)["Restarts"] for task in tasks] == ["0", "1", "0"]
    output = user.output(int(states[0]["JobId"]))
    start = user.cluster.run("date", "-d", states[0]["StartTime"], "+%s").stdout
    assert f"end {int(start) + 3600}\nasked {int(start) + 3600}.0\n" in output
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


def test_templates_report_a_missing_supervise_sh(user):
    job = user.sbatch("pretrain.sbatch", "r.yaml", DSMIM_SLURM="/nowhere")
    state = user.cluster.wait(job, timeout=30)
    assert state["ExitCode"] == "1:0" and "no /nowhere/supervise.sh: submit from dsmim's folder" in user.output(job)
