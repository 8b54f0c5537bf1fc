"""Fixtures: tars made on the fly, and ways to run dsmim as a user does."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.prefork import Piped, Server

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # a machine with GPUs runs the same tests
ROOT = Path(__file__).parent.parent
PATIENCE = "DSMIM_TEST_TIMEOUT_FACTOR"


def patience(seconds: float) -> float:
    """Return a deadline's seconds times the environment variable DSMIM_TEST_TIMEOUT_FACTOR (1 if it is not set).

    Every deadline that a slow or busy machine may miss goes through here. Raises pytest.UsageError unless the variable
    is a number of at least 1.
    """
    text = os.environ.get(PATIENCE, "1")
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 1 <= factor < float("inf"):
        raise pytest.UsageError(f"{PATIENCE}={text!r}: give a number of at least 1; it multiplies the tests' deadlines")
    return seconds * factor


def pytest_configure() -> None:
    patience(1)  # a wrong factor is reported once, before any test
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with SIGINT ignored


def image_bytes(number: int, side: int = 40, kind: str = "PNG") -> bytes:
    """A small image that depends on its number alone."""
    pixels = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((side + number % 5, side), Image.Resampling.BICUBIC).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A tar as Python's tarfile (and GNU tar) writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def make_shards(folder: Path, counts: list[int], name: str = "train", classes: int = 3, side: int = 40) -> list[Path]:
    """Indexed shards of labelled images; keys k00000, k00001, … run through all of them."""
    from dsmim.shards.index import write_index

    paths, number = [], 0
    for shard, count in enumerate(counts):
        members = []
        for _ in range(count):
            key = f"k{number:05d}"
            members += [(f"{key}.png", image_bytes(number, side)), (f"{key}.cls", b"%d" % (number % classes))]
            number += 1
        paths.append(write_tar(folder / f"{name}-{shard:03d}.tar", members))
        write_index(paths[-1])
    return paths


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """A folder with train-*.tar (5 uneven shards, 53 samples) and val-*.tar (2 shards, 13 samples)."""
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder, [17, 3, 13, 11, 9])
    make_shards(folder, [8, 5], name="val")
    return folder


def tiny_recipe(folder: Path, **changes) -> dict:
    """A SimMIM recipe that trains in seconds; `changes` replace whole sections."""
    return {
        "name": "tiny",
        "task": {"name": "simmim", "mask_patch": 16},
        "model": {"name": "swinv2_nano", "img_size": 32, "window_size": 4, "drop_path_rate": 0.1},
        "data": {"train": f"{folder}/train-*.tar", "val": f"{folder}/val-*.tar", "workers": 0, "shuffle_window": 2},
        "batch": {"global_batch": 8, "eval_batch": 4},
        "optim": {"lr": 1e-3, "layer_decay": 0.9},
        "schedule": {"duration": {"steps": 6}, "warmup": {"steps": 1}},
        "validation": {"every": {"steps": 3}},
        "checkpoint": {"every": {"steps": 2}, "keep": 3},
        "log": {"every": 1, "tensorboard": False},
    } | changes


def environment(**extra: str) -> dict[str, str]:
    """The environment of a fresh user shell, without what a launcher around the tests may have left."""
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if k not in dropped and not k.startswith(("SLURM_", "OMPI_", "PMI"))}
    path = f"{Path(sys.executable).parent}:{kept['PATH']}"
    return kept | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": path} | extra


def run(*words: object, check: bool = True, cwd: Path = ROOT, silence: float = 300, **env: str):
    """Run a command to its end. With check, a failure of it fails the test and shows what it printed.

    Kill it and fail when it prints nothing for `silence` seconds (see patience). However long it takes in all, output
    is progress. `dsmim …` is forked from a process that has imported everything (prefork.py).
    """
    command = [str(word) for word in words]
    if command[0] == "dsmim" and server().fits(environment(**env)):
        return _run_forked([(command[1:], environment(**env))], cwd, silence, check)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", cwd=cwd,
        env=environment(**env), start_new_session=True,
    ) as process:  # fmt: skip
        return _finish(process, [process.pid], silence, check)


@cache
def server() -> Server:
    """The server of prefork.py of this pytest worker."""
    return Server(environment())


def _run_forked(commands: list[tuple[list[str], dict[str, str]]], cwd: Path, silence: float, check: bool):
    piped = Piped(server(), commands, cwd)
    return _finish(piped, piped.pids, silence, check)


def _finish(process: subprocess.Popen | Piped, pids: list[int], silence: float, check: bool):
    try:
        stdout, stderr = _output(process, patience(silence))
    except BaseException:
        for number in pids:
            _kill(number)
        raise
    if check and process.returncode:
        pytest.fail(f"{process.args} ended with {process.returncode}:\n{stdout[-3000:]}\n{stderr[-6000:]}")
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def _output(process: subprocess.Popen | Piped, silence: float) -> tuple[str, str]:
    """Return stdout and stderr of a process that ends, or fail once it has printed nothing for so many seconds."""
    printed, since = -1, 0.0
    while True:
        try:
            return process.communicate(timeout=min(1.0, silence))
        except subprocess.TimeoutExpired as so_far:
            both = (so_far.output or b"") + (so_far.stderr or b"")
        if len(both) != printed:
            printed, since = len(both), time.monotonic()
        elif time.monotonic() - since > silence:
            said = both[-6000:].decode(errors="replace")
            pytest.fail(f"{process.args} printed nothing for {silence:g} s and was killed; before:\n{said}")


def _kill(number: int) -> None:
    """Kill a process, all below it, and its process group, whose number is the same.

    A launcher's ranks would outlive it, and they may have groups of their own. What a command that has ended left in
    the background is no longer below it, but in its group.
    """
    with suppress(psutil.NoSuchProcess):
        first = psutil.Process(number)
        for member in [*first.children(recursive=True), first]:
            with suppress(psutil.NoSuchProcess):
                member.kill()
    with suppress(ProcessLookupError):
        os.killpg(number, signal.SIGKILL)


def dsmim(*words: object, **options):
    """`dsmim …` in one process."""
    return run("dsmim", *words, **options)


def two_ranks(*words: object, **options):
    """`torchrun` with two ranks on this machine."""
    return run("torchrun", "--nproc-per-node", "2", "--master-port", str(_port()), *words, **options)


def two_forked_ranks(*words: object, check: bool = True, cwd: Path = ROOT, silence: float = 300, **env: str):
    """`dsmim …` on two ranks, in the environment that torchrun gives them; forked from a process that has imported
    everything. As under torchrun, a rank that fails ends the other one."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    place |= {"TORCHELASTIC_RUN_ID": "none", "GROUP_RANK": "0"}
    texts = [str(word) for word in words]
    ranks = [environment(RANK=rank, LOCAL_RANK=rank, **place, **env) for rank in ("0", "1")]
    return _run_forked([(texts, each) for each in ranks], cwd, silence, check)


def _port() -> int:
    from dsmim.cluster.placement import free_port

    return free_port()
