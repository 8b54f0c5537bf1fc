"""What tests of whole runs share: starting, stopping and comparing them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml

from benchmarks.kill_resume_compare import leaves, stream
from dsmim.checkpoint import zero_shards
from dsmim.checkpoint.reading import locate
from dsmim.cluster.placement import free_port
from tests.conftest import ROOT, environment, patience, server, tiny_recipe


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    return zero_shards.read_weights(locate(path))


def write_recipe(folder: Path, shards: Path, **changes) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(shards, **changes)))
    return path


def metrics(run_dir: Path) -> list[dict]:
    """The run's stream, without what no two runs share."""
    return stream(run_dir / "metrics.jsonl")


def wait_for(condition, process: subprocess.Popen, seconds: float = 200) -> None:
    """Until the condition holds; fails when the process ends before."""
    deadline = time.monotonic() + patience(seconds)
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode} too early"
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def kill_after_checkpoint(checkpoint: Path, *words: object) -> None:
    """Start a command, SIGKILL its whole process group as soon as the checkpoint is there."""
    with subprocess.Popen(
        [str(w) for w in words], env=environment(), cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        wait_for(checkpoint.exists, process)
        os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def ranks(log: Path, count: int, *words: object, **env: str):
    """`dsmim …` on so many ranks without a launcher, so that each one's exit status is seen; killed at the end.

    Standard error of all goes to `log`.
    """
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    place["LOCAL_WORLD_SIZE"] = str(count)
    with log.open("w") as file, Path(os.devnull).open("w") as nothing:
        texts, streams = [str(word) for word in words], (nothing.fileno(), file.fileno())
        processes = [
            server().start(texts, ROOT, environment(RANK=str(rank), LOCAL_RANK=str(rank), **place, **env), *streams)
            for rank in range(count)
        ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def tensors(file: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a file of DeepSpeed's, with its path."""
    found = leaves(torch.load(file, weights_only=False))
    return {path: value for path, value in found if isinstance(value, torch.Tensor)}


def assert_same_bytes(one: Path, other: Path) -> None:
    """Every weight, and the optimizer's state in every rank's file: moments, moving average, counters."""
    these, those = (read_weights(folder) for folder in (one, other))
    assert these.keys() == those.keys() and len(these) > 100
    for name, value in these.items():
        assert value.numpy().tobytes() == those[name].numpy().tobytes(), name
    files = sorted(path.name for path in one.glob("*optim_states.pt"))
    assert len(files) == 2 and files == sorted(path.name for path in other.glob("*optim_states.pt"))
    compared = 0
    for name in files:
        left, right = (tensors(folder / name) for folder in (one, other))
        assert left.keys() == right.keys()
        for path, value in left.items():
            assert value.detach().numpy().tobytes() == right[path].detach().numpy().tobytes(), (name, path)
            compared += value.numel()
    assert compared > 7_000_000  # weights and two moments of 2.4 M parameters
