"""Requests to stop reach real runs: while they train, validate and wait for data."""

import signal
from pathlib import Path

import pytest

from dsmim.shards.index import write_index
from tests.conftest import dsmim, make_shards, patience, two_ranks
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
    two_ranks("-m", "dsmim", "train", recipe, "--run-dir", tmp_path / "straight")
    stopped = tmp_path / "stopped"
    command = ("train", recipe, "--run-dir", stopped, "checkpoint.background=true", "data.workers=1")
    log = tmp_path / "log"
    with ranks(log, 2, *command) as processes:
        wait_for(lambda: "step 3/30" in log.read_text(), processes[0])
        processes[1].send_signal(signal.SIGUSR1)
        assert leave(processes) == [75, 75]
    said = log.read_text()
    assert "asked to stop: another rank was" in said and "with everything saved; start again to resume" in said
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
        checkpoint={"every": {"steps": 4}, "keep": 1, "keep_best": {"metric": "loss", "mode": "max"}},
    )  # fmt: skip
    dsmim("train", recipe, "--run-dir", tmp_path / "straight")
    indexes, piped = tmp_path / "indexes", []
    for kind in ("train", "val"):
        write_index(pipe := f"pipe:sh {gated}/{kind}.sh", indexes, copy=plain / f"{kind}-000.tar")
        piped.append(f"data.{kind}={pipe}")
    command = (
        "train", recipe, "--run-dir", tmp_path / "stopped", *piped, "data.allow_pipe=true", "data.workers=1",
        f"data.cache_dir={tmp_path}/cache", f"data.index_dir={indexes}",
    )  # fmt: skip
    log = tmp_path / "log"
    for place, gate in (("step 0", "train"), ("step 2", "val")):
        with ranks(log, 1, *command) as processes:
            wait_for((gated / f"asked-{gate}").exists, processes[0])
            processes[0].send_signal(signal.SIGTERM)
            assert leave(processes) == [75]
        assert f"stopped at {place} of 4" in log.read_text()
        (gated / f"go-{gate}").touch()
    with ranks(log, 1, *command) as processes:
        assert leave(processes, 100) == [0]
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "stopped")
    assert [line["step"] for line in metrics(tmp_path / "stopped")] == [1, 2, 2, 3, 4, 4]
    for run in ("straight", "stopped"):  # the one of the interrupted validation is a candidate too
        kept = sorted(path.name for path in (tmp_path / run / "checkpoints").glob("step_*"))
        assert kept == ["step_00000002", "step_00000004"]
        assert (tmp_path / run / "checkpoints/best").read_text() == "step_00000002"
