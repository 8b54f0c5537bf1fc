"""Fixtures: tars made on the fly, and ways to run dsmim as a user does."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # a machine with GPUs runs the same tests
ROOT = Path(__file__).parent.parent


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


def run(*words: object, check: bool = True, cwd: Path = ROOT, timeout: float = 300, **env: str):
    """Run a command to its end; with check, its failure shows what it printed."""
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, cwd=cwd, env=environment(**env), timeout=timeout
    )
    if check and done.returncode:
        pytest.fail(f"{words} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done


def dsmim(*words: object, **options):
    """`dsmim …` in one process."""
    return run("dsmim", *words, **options)


def two_ranks(*words: object, **options):
    """`torchrun` with two ranks on this machine."""
    return run("torchrun", "--nproc-per-node", "2", "--master-port", str(_port()), *words, **options)


def _port() -> int:
    from dsmim.cluster.placement import free_port

    return free_port()
