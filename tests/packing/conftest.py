"""Sources of a build: class folders and tars."""

from pathlib import Path

import pytest

from dsmim.shards.index import write_index
from tests.conftest import image_bytes, write_tar


@pytest.fixture
def folder(tmp_path):
    for label, name in enumerate(("cat", "dog")):
        for i in range(5):
            path = tmp_path / "images" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image_bytes(10 * label + i))
    return tmp_path / "images"


@pytest.fixture
def tars(tmp_path) -> Path:
    """Three tars of 9 labelled samples with a further member each."""
    for shard in range(3):
        members = []
        for i in range(3 * shard, 3 * shard + 3):
            members += [(f"k{i}.png", image_bytes(i)), (f"k{i}.cls", b"%d" % (i % 2)), (f"k{i}.json", b'{"i":%d}' % i)]
        write_index(write_tar(tmp_path / f"tars/t-{shard}.tar", members))
    return tmp_path / "tars"
