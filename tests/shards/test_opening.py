"""`dsmim shards build|verify` as a user runs them."""

import json
import os
from pathlib import Path

import pytest

from dsmim.packing.sources import read_sources, split_sources
from dsmim.packing.writer import Writing, build
from dsmim.shards.index import index_file
from dsmim.shards.opening import expand, open_shards
from dsmim.shards.tar import parse_sample
from tests.conftest import dsmim, image_bytes, make_shards, write_tar


@pytest.fixture
def folder(tmp_path):
    for label, name in enumerate(("cat", "dog")):
        for i in range(5):
            path = tmp_path / "images" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image_bytes(10 * label + i))
    return tmp_path / "images"


def samples_of(pattern) -> dict[str, dict[str, bytes]]:
    found = {}
    for index in open_shards(str(pattern), None, "test"):
        data, table = Path(index.tar).read_bytes(), index.table()
        places = [table.place(row) for row in range(index.samples)]
        found |= dict(parse_sample(data[offset : offset + length]) for offset, length in places)
    return found


def test_build_from_class_folders_keeps_bytes_and_labels(folder, tmp_path):
    done = dsmim("shards", "build", folder, tmp_path / "out", "--split", "train=0.7,val=0.3", "--per-shard", 3)
    assert "10 images in 4 shards" in done.stdout
    found = samples_of(tmp_path / "out")
    assert {key: members["png"] for key, members in found.items()} == {
        f"{name}/{i}": (folder / name / f"{i}.png").read_bytes() for name in ("cat", "dog") for i in range(5)
    }
    assert all(members["cls"] == (b"0" if key.startswith("cat") else b"1") for key, members in found.items())
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["cat", "dog"]
    assert len(samples_of(tmp_path / "out" / "val-*.tar")) == 3


def test_build_twice_gives_the_same_bytes(folder, tmp_path):
    for out in ("a", "b"):
        dsmim("shards", "build", folder, tmp_path / out)
    assert (tmp_path / "a/data-000000.tar").read_bytes() == (tmp_path / "b/data-000000.tar").read_bytes()
    again = dsmim("shards", "build", folder, tmp_path / "a", check=False)
    assert again.returncode == 0 and "10 images in 1 shards" in again.stdout and "1 kept" in again.stdout
    other = dsmim("shards", "build", folder, tmp_path / "a", "--seed", 1, check=False)
    assert other.returncode == 1 and "is there already, by a build that differs in sources" in other.stderr


def test_build_from_tables(folder, tmp_path):
    table = tmp_path / "t.tsv"
    table.write_text("path\tlabel\nimages/cat/1.png\t3\nimages/dog/2.png\t0\n")
    build(split_sources(read_sources(str(table))[0], {}, 0), tmp_path / "out", [])
    assert {k: m["cls"] for k, m in samples_of(tmp_path / "out").items()} == {
        "images/cat/1": b"3",
        "images/dog/2": b"0",
    }
    named = tmp_path / "t.csv"
    named.write_text("cat/1.png,tabby\ndog/2.png,beagle\n")
    sources, classes = read_sources(str(named), root=folder)
    assert classes == ["beagle", "tabby"] and [s.label for s in sources] == [1, 0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("path,label\nx.png,1\n", "no such file"),
        ("images/cat/1.png,1\nimages/cat/2.png\n", "row 2"),
        ("", "no images found"),
        ("images/cat/1.png,1\nimages/cat/2.png,\n", "row 2 has the label '' where the first one is a number"),
        ("images/cat/1.png,1\nimages/cat/2.png,-1\n", "row 2 has the label '-1'"),
        ("images/cat/1.png,tabby\nimages/cat/2.png,3\n", "row 2 has the label '3' where the first one is a name"),
        ("images/cat/1.png\nimages/cat/1.png\n", "share the key"),
    ],
)
def test_bad_tables(folder, tmp_path, rows, message):
    table = tmp_path / "t.csv"
    table.write_text(rows)
    with pytest.raises(ValueError, match=message):
        read_sources(str(table))


def test_images_beside_class_folders_are_refused(folder):
    (folder / "stray.png").write_bytes(image_bytes(1))
    with pytest.raises(ValueError, match="beside class folders"):
        read_sources(str(folder))


def test_short_side(folder, tmp_path):
    from dsmim.data.decode import decode

    build(split_sources(read_sources(str(folder))[0], {}, 0), tmp_path / "out", [], Writing(short_side=24))
    assert {min(decode(m["png"]).shape[1:]) for m in samples_of(tmp_path / "out").values()} == {24}


def test_splits():
    sources = list(range(10))
    parts = split_sources(sources, {"train": 0.7, "val": 0.3}, seed=0)
    assert [len(part) for part in parts.values()] == [7, 3]
    assert sorted(parts["train"] + parts["val"]) == sources
    assert split_sources(sources, {"train": 0.5}, seed=0)["train"] == parts["train"][:5]
    with pytest.raises(ValueError, match="more than 1"):
        split_sources(sources, {"a": 0.7, "b": 0.6}, seed=0)
    with pytest.raises(ValueError, match="is none"):
        split_sources(sources, {"a": 0.05}, seed=0)


def test_verify_names_what_is_wrong_where(tmp_path):
    paths = make_shards(tmp_path, [3, 3, 3])
    assert dsmim("shards", "verify", tmp_path, "--decode").stdout.endswith("all shards are as indexed\n")
    data = bytearray(paths[1].read_bytes())
    data[600] ^= 1
    stamp = Path(index_file(str(paths[1]))).stat().st_mtime_ns
    paths[1].write_bytes(data)
    os.utime(paths[1], ns=(stamp, stamp))
    Path(index_file(str(paths[2]))).unlink()
    done = dsmim("shards", "verify", tmp_path, check=False)
    assert done.returncode == 1 and done.stdout.endswith("2 problems\n")
    assert f"{paths[1]}: contents differ" in done.stdout and f"{paths[2]}: has no index" in done.stdout


def test_verify_decodes(tmp_path):
    write_tar(tmp_path / "t.tar", [("good.png", image_bytes(0)), ("bad.png", b"no image")])
    dsmim("shards", "index", tmp_path)
    assert dsmim("shards", "verify", tmp_path, check=False).returncode == 0
    done = dsmim("shards", "verify", tmp_path, "--decode", check=False)
    assert done.returncode == 1 and "bad.png cannot be decoded" in done.stdout and "1 problems" in done.stdout


def test_index_reports_every_bad_shard(tmp_path):
    make_shards(tmp_path, [2])
    for name in ("x", "y"):
        (tmp_path / f"{name}.tar").write_bytes(b"rubbish" * 200)
    done = dsmim("shards", "index", tmp_path, check=False)
    assert done.returncode == 1 and "x.tar: no readable tar" in done.stderr and "y.tar" in done.stderr
    assert "Traceback" not in done.stderr


def test_expand_order_is_sorted(tmp_path):
    make_shards(tmp_path, [1] * 3)
    assert [Path(p).name for p in expand(str(tmp_path))] == [f"train-{i:03d}.tar" for i in range(3)]
