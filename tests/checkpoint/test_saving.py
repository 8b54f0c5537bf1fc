"""Which checkpoints stay, and what the writer does with a disk that refuses."""

import hashlib
import json
import resource
import signal
from pathlib import Path

import pytest
import torch

from dsmim.checkpoint.reading import FORMAT, candidates, name_of
from dsmim.checkpoint.saving import best_of


def make(folder: Path, step: int, **validation) -> Path:
    path = folder / name_of(step)
    path.mkdir(parents=True)
    (path / "state.json").write_text(json.dumps({"format": FORMAT, "step": step, "validation": validation or None}))
    return path


def test_the_best_is_the_one_whose_own_validation_was(tmp_path):
    for step, figures in ((10, {"loss": 3.0}), (20, {"loss": 1.0}), (30, {}), (40, {"loss": 1.0}), (50, {"loss": 2.0})):
        make(tmp_path, step, **figures)
    found = candidates(tmp_path)
    assert [path.name for path in found] == [name_of(step) for step in (50, 40, 30, 20, 10)]
    assert best_of(found, "loss", "min").name == name_of(20)  # of equals the older, or it would wander
    assert best_of(found, "loss", "max").name == name_of(10)
    assert best_of(found, "accuracy", "max") is None
    (tmp_path / name_of(20) / "state.json").write_text("{")
    assert best_of(found, "loss", "min").name == name_of(40)


@pytest.mark.parametrize("background", [False, True])
def test_the_writer_digests_what_it_writes_and_keeps_a_refusal(tmp_path, background):
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo

    from dsmim.engine.writer import Writer

    writer, state = Writer(background), {"a": torch.randn(50_000), "b": [1, "x"]}
    info = CheckpointCommitInfo("tag", str(tmp_path), False)
    writer.create(info)
    writer.save(state, str(tmp_path / "one.pt"))
    state["a"].zero_()  # training goes on: what was handed over must not change
    entries = writer.entries()
    data = (tmp_path / "one.pt").read_bytes()
    assert entries == {"one.pt": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    assert writer.bytes == len(data) and not writer.busy
    assert torch.load(tmp_path / "one.pt", weights_only=True, mmap=True)["a"].abs().sum() > 0

    writer.create(info)
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))  # as a full disk: the write fails in its middle
    try:
        writer.save(state, str(tmp_path / "two.pt"))  # must not raise: other ranks wait in DeepSpeed's barriers
        with pytest.raises(OSError, match="File too large"):
            writer.entries()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "two.pt").stat().st_size <= 100_000
    writer.close()


def test_a_metric_that_is_not_finite_is_never_the_best(tmp_path):
    make(tmp_path, 10, loss=float("nan"))
    make(tmp_path, 20, loss=0.2)
    make(tmp_path, 30, loss=0.1)
    assert best_of(candidates(tmp_path), "loss", "min").name == name_of(30)
    assert best_of(candidates(tmp_path), "loss", "max").name == name_of(20)
