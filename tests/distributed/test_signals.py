"""Requests to stop reach real runs: while they train, validate and wait for data."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from dsmim.shards.index import describe_tar, write_sidecar
from dsmim.shards.sidecar import index_file
from tests.conftest import dsmim, make_shards, patience, two_forked_ranks
from tests.distributed.runs import assert_same_bytes, metrics, ranks, wait_for, write_recipe


def leave(processes, seconds: float = 60) -> list[int]:
    return [process.wait(timeout=patience(seconds)) for process in processes]


def test_stopped_twice_and_resumed_equals_uninterrupted(tmp_path, shards):
    """Two ranks at ZeRO-3, with a moving average and saving in the background; one rank is signalled, then both."""
    recipe = write_recipe(
        tmp_path, shards, optim={"lr": 1e-3, "layer_decay": 0.9, "ema_decay": 0.9},
        schedule={"duration": {"steps": 30}, "warmup": {"steps": 1}}, validation={"every": {"steps": 10}},
        checkpoint={"every": {"steps": 8}, "keep": 1, "keep_every": {"steps": 24}},
    )  # fmt: skip
    two_forked_ranks("train", recipe, "--run-dir", tmp_path / "straight")
    stopped = tmp_path / "stopped"
    command = ("train", recipe, "--run-dir", stopped, "checkpoint.background=true", "data.workers=1")
    log = tmp_path / "log"
    with ranks(log, 2, *command) as processes:
        wait_for(lambda: "step 3/30" in log.read_text(), processes[0])
        processes[1].send_signal(signal.SIGUSR1)
        assert leave(processes) == [75, 75]
    said = log.read_text()
    assert "asked to stop: another rank was" in said
    assert "with everything saved; start the same command again to resume" in said and "Traceback" not in said
    first = int((stopped / "checkpoints/latest").read_text().split("_")[1])
    assert 3 <= first < 16
    with ranks(log, 2, *command) as processes:
        wait_for(lambda: "step 18/30" in log.read_text(), processes[0])
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGTERM, signal.SIGUSR1):
            for process in processes:
                process.send_signal(number)
        assert leave(processes) == [75, 75]
    assert f"resumed from {stopped}/checkpoints/step_{first:08d}" in log.read_text()
    with ranks(log, 2, *command) as processes:
        assert leave(processes, 200) == [0, 0]
    assert_same_bytes(*(run / "checkpoints/step_00000030" for run in (tmp_path / "straight", stopped)))
    assert metrics(tmp_path / "straight") == metrics(stopped) and len(metrics(stopped)) == 30 + 3
    kept = sorted(path.name for path in (stopped / "checkpoints").glob("step_*"))
    assert kept == ["step_00000024", "step_00000030"]  # the newest, and the multiple of 24
    assert not list((stopped / "checkpoints").glob(".*"))


@pytest.fixture
def gated(tmp_path) -> Path:
    """Shards behind commands that say by a file `asked-NAME` that they run, and wait for `go-NAME`."""
    for name, counts in (("train", [24]), ("val", [6])):
        tar = make_shards(tmp_path / "plain", counts, name=name)[0]
        script = tmp_path / f"{name}.sh"
        script.write_text(
            f"touch {tmp_path}/asked-{name}; while [ ! -e {tmp_path}/go-{name} ]; do sleep 0.05; done; cat {tar}\n"
        )
    return tmp_path


def test_stopped_while_waiting_for_data_and_in_validation(tmp_path, gated):
    plain = gated / "plain"
    recipe = write_recipe(
        tmp_path, plain, validation={"every": {"steps": 2}},
        schedule={"duration": {"steps": 4}, "warmup": {"steps": 1}},
        checkpoint={"every": {"steps": 4}, "keep": 1, "keep_best": {"metric": "loss", "mode": "min"}},
        optim={"lr": 0.3},  # so that the loss grows: the first validation is the best
    )  # fmt: skip
    dsmim("train", recipe, "--run-dir", tmp_path / "straight")
    indexes, piped = tmp_path / "indexes", []
    for kind in ("train", "val"):
        pipe = f"pipe:sh {gated}/{kind}.sh"
        write_sidecar(pipe, index_file(pipe, indexes), *describe_tar(plain / f"{kind}-000.tar", pipe))
        piped.append(f"data.{kind}={pipe}")
    command = (
        "train", recipe, "--run-dir", tmp_path / "stopped", *piped, "data.allow_pipe=true", "data.workers=1",
        f"data.cache_dir={tmp_path}/cache", f"data.index_dir={indexes}",
    )  # fmt: skip
    log = tmp_path / "log"
    for gate, status, told in (
        ("train", 76, "asked to stop (SIGTERM) before the first step of this session; the run is still at step 0 of 4"),
        ("val", 75, "stopped at step 2 of 4 with everything saved"),
        ("val", 76, "asked to stop (SIGTERM) before the first step of this session; the run is still at step 2 of 4"),
    ):
        (gated / f"asked-{gate}").unlink(missing_ok=True)
        with ranks(log, 1, *command) as processes:
            wait_for((gated / f"asked-{gate}").exists, processes[0])
            processes[0].send_signal(signal.SIGTERM)
            assert leave(processes) == [status]
        said = log.read_text()
        assert said.count(told) == 1 and "Traceback" not in said, said
        assert ("everything saved" in said) == (status == 75)
        if gate == "train":
            assert not list((tmp_path / "stopped/checkpoints").glob("step_*"))
            (gated / "go-train").touch()
    (gated / "go-val").touch()
    with ranks(log, 1, *command) as processes:
        assert leave(processes, 100) == [0]
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "stopped")
    assert [line["step"] for line in metrics(tmp_path / "stopped")] == [1, 2, 2, 3, 4, 4]
    for run in ("straight", "stopped"):  # the one of the interrupted validation is a candidate too
        kept = sorted(path.name for path in (tmp_path / run / "checkpoints").glob("step_*"))
        assert kept == ["step_00000002", "step_00000004"]
        assert (tmp_path / run / "checkpoints/best").read_text() == "step_00000002"


def test_ctrl_c_saves_and_the_same_command_continues(tmp_path, shards):
    """A terminal sends SIGINT to every process, also to data workers; torchrun then sends its ranks another one."""
    recipe = write_recipe(tmp_path, shards, schedule={"duration": {"steps": 200}, "warmup": {"steps": 1}})
    command = ("train", recipe, "--run-dir", tmp_path / "run", "data.workers=1", "data.val=null", "checkpoint.keep=1")
    log = tmp_path / "log"
    with ranks(log, 2, *command) as processes:
        wait_for(lambda: "step 2/200" in log.read_text(), processes[0])
        for _ in range(2):
            for process in processes:
                os.killpg(process.pid, signal.SIGINT)
        assert leave(processes) == [75, 75]
    said = log.read_text()
    assert said.count("Ctrl-C: saving; press Ctrl-C again to leave at once\n") == 1
    assert "asked to stop: Ctrl-C\n" in said and "Traceback" not in said, said
    step = int((tmp_path / "run/checkpoints/latest").read_text().split("_")[1])
    assert 2 <= step < 200
    assert f"stopped at step {step} of 200 with everything saved; start the same command again to resume" in said
    with ranks(log, 2, *command, f"schedule.duration.steps={step + 1}", "--fork") as processes:
        assert leave(processes) == [0, 0]
    assert f"resumed from {tmp_path}/run/checkpoints/step_{step:08d}" in log.read_text()


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_slurm_ends_because_of_another_one_does_not_claim_to_have_saved(tmp_path, shards, fault):
    """Slurm 26.05 sends SIGCONT and SIGTERM to the ranks that are left, and kills them KillWait (30 s) later."""
    steps = {"duration": {"steps": 2000}, "warmup": {"steps": 1}}
    recipe = write_recipe(tmp_path, shards, schedule=steps, checkpoint={"every": {"steps": 2000}})
    log = tmp_path / "log"
    with ranks(log, 2, "train", recipe, "--run-dir", tmp_path / "run", "data.val=null") as processes:
        wait_for(lambda: "step 3/2000" in log.read_text(), processes[0])
        processes[1].send_signal(fault)
        time.sleep(0.5)  # the other rank waits in a collective
        for number in (signal.SIGCONT, signal.SIGTERM):
            processes[0].send_signal(number)
        assert leave(processes[:1], 29) == [70]
    said = log.read_text()
    assert len(re.findall(r"rank 0( on \S+)?: rank 1 on \S+ has given no sign of life for", said)) == 1, said
    assert "everything saved" not in said and not list((tmp_path / "run/checkpoints").glob("step_*"))
