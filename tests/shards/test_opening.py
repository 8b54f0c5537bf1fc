"""From patterns to indexed shards: patterns, and the indexing of many shards."""

from pathlib import Path

import pytest

from dsmim.shards.index import read_index
from dsmim.shards.opening import expand, index_all, open_shards
from tests.conftest import dsmim, make_shards


def test_read_only_shards_are_indexed_elsewhere(tmp_path):
    path = make_shards(tmp_path / "shards", [3])[0]
    sidecar = Path(f"{path}.dsmi")
    sidecar.unlink()
    index_all([str(path)], str(tmp_path / "idx"), workers=1)
    assert read_index(path, tmp_path / "idx").samples == 3 and not sidecar.exists()


def test_shards_of_one_name_share_an_index_dir(tmp_path):
    for folder, count in (("train", 3), ("val", 2)):
        make_shards(tmp_path / folder, [count])
    paths = [tmp_path / folder / "train-000.tar" for folder in ("train", "val")]
    indexes = index_all([str(path) for path in paths], str(tmp_path / "idx"), workers=1)
    assert [read_index(path, tmp_path / "idx").samples for path in paths] == [3, 2]
    assert [index.samples for index in indexes.shards] == [3, 2]


def test_patterns(tmp_path):
    paths = make_shards(tmp_path, [1, 1, 1])
    assert (
        expand(f"{tmp_path}/train-{{000..002}}.tar")
        == expand(str(tmp_path))
        == expand(f"{tmp_path}/*.tar")
        == [str(path) for path in paths]
    )
    with pytest.raises(ValueError, match=r"data\.train: no shards match .*nothing"):
        open_shards(f"{tmp_path}/nothing-*.tar", None, "data.train")
    with pytest.raises(ValueError, match="given twice"):
        expand([str(paths[0]), str(tmp_path)])
    with pytest.raises(ValueError, match="allow it with"):
        expand("pipe:cat x.tar")
    with pytest.raises(ValueError, match=r"'\*' cannot be expanded in a URL"):
        expand("http://127.0.0.1/x/*.tar")
    assert expand("http://127.0.0.1/{0..2}.tar") == [f"http://127.0.0.1/{i}.tar" for i in range(3)]


def test_a_shard_missing_in_a_range_is_an_error(tmp_path):
    make_shards(tmp_path, [1, 1, 1])[1].unlink()
    with pytest.raises(ValueError, match=r"data\.train: no shards match '.*train-001\.tar' of '.*\{000\.\.002\}"):
        expand(f"{tmp_path}/train-{{000..002}}.tar", "data.train")
    with pytest.raises(ValueError, match="no shards given"):
        expand([])


def test_index_reports_every_bad_shard(tmp_path):
    make_shards(tmp_path, [2])
    for name in ("x", "y"):
        (tmp_path / f"{name}.tar").write_bytes(b"damage" * 200)
    done = dsmim("shards", "index", tmp_path, check=False)
    assert done.returncode == 1 and "x.tar: no readable tar" in done.stderr and "y.tar" in done.stderr
    assert "Traceback" not in done.stderr


def test_expand_order_is_sorted(tmp_path):
    make_shards(tmp_path, [1] * 3)
    assert [Path(p).name for p in expand(str(tmp_path))] == [f"train-{i:03d}.tar" for i in range(3)]


def test_folders_whose_names_are_no_patterns(tmp_path):
    """Brackets, spaces and commas in the names of folders that exist."""
    for name in ("my data [v2]", "v"):
        make_shards(tmp_path / name, [1, 1])
    paths = [str(tmp_path / f"my data [v2]/train-00{i}.tar") for i in range(2)]
    assert expand(f"{tmp_path}/my data [v2]/train-*.tar") == expand(f"{tmp_path}/my data [v2]/**/*-00[01].tar") == paths
    assert expand(f"{tmp_path}/[v]/train-*.tar") == [f"{tmp_path}/v/train-00{i}.tar" for i in range(2)]  # a glob still
    with pytest.raises(ValueError, match=r"no shards match .*; give tars, a folder of tars, or a pattern in quotes"):
        expand(f"{tmp_path}/my data [v2]/val-*.tar")


def test_what_names_no_shard_says_what_to_do(tmp_path):
    (tmp_path / "pics").mkdir()
    (tmp_path / "pics/a.jpg").write_bytes(b"x")
    (tmp_path / "none").mkdir()
    for text, message in [
        (
            f"{tmp_path}/pics",
            rf"folder of images: make shards of it first, run: dsmim shards build {tmp_path}/pics",
        ),
        (f"{tmp_path}/none", r"it is a folder without \.tar files; to make shards of images, run: dsmim shards build"),
        (f"{tmp_path}/pics/b.jpg", r"to make shards of images, run: dsmim shards build SOURCE SHARDS"),
        ("nowhere.tar", rf"no shards match 'nowhere\.tar' \(looked in {Path.cwd()}\); give tars, a folder of tars"),
        ("a.tar,b.tar", r"several patterns are a list"),
        ("a.tar::b.tar", r"several patterns are a list"),
    ]:
        with pytest.raises(ValueError, match=message):
            expand(text, "data.train")


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (path,) = make_shards(tmp_path / "in", [1])
    assert expand("~/in/*.tar") == expand("~/in") == expand("~/in/train-000.tar") == [str(path)]
