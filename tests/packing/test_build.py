"""`dsmim shards build`: from folders, tables and tars; shrunk, filtered, killed and run again."""

import fcntl
import json
import os
import random
import subprocess
import time
from contextlib import suppress

import pytest

from dsmim.cli.main import main
from dsmim.data.decode import decode
from dsmim.packing.sources import read_sources, split_sources
from dsmim.packing.writer import WriteOptions, build_shards
from dsmim.shards.index import read_index, write_index
from dsmim.shards.opening import open_shards
from tests.conftest import dsmim, environment, image_bytes, write_tar
from tests.packing.contents import samples_of


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
    assert other.returncode == 1 and "exists already, from a build that differs in sources" in other.stderr


def test_build_from_tables(folder, tmp_path):
    table = tmp_path / "t.tsv"
    table.write_text("path\tlabel\nimages/cat/1.png\t3\nimages/dog/2.png\t0\n")
    build_shards(split_sources(read_sources(str(table))[0], {}, 0), tmp_path / "out", [])
    assert {k: m["cls"] for k, m in samples_of(tmp_path / "out").items()} == {
        "images/cat/1": b"3",
        "images/dog/2": b"0",
    }
    named = tmp_path / "t.csv"
    named.write_text("cat/1.png,tabby\ndog/2.png,beagle\n")
    found = read_sources(str(named), root=folder)
    assert found.classes == ["beagle", "tabby"] and [source.label for source in found.sources] == [1, 0]


def test_short_side(folder, tmp_path):
    from dsmim.data.decode import decode

    build_shards(split_sources(read_sources(str(folder))[0], {}, 0), tmp_path / "out", [], WriteOptions(short_side=24))
    assert {min(decode(m["png"]).shape[1:]) for m in samples_of(tmp_path / "out").values()} == {24}


def test_samples_of_tars_are_sharded_again_with_all_members(tars, tmp_path):
    done = dsmim("shards", "build", f"{tars}/t-*.tar", tmp_path / "out", "--per-shard", 4)
    assert "9 images in 3 shards" in done.stdout
    assert samples_of(tmp_path / "out") == samples_of(tars)
    orders = [[key for index in open_shards(str(p)) for key in index.table().keys] for p in (tars, tmp_path / "out")]
    assert orders[0] != orders[1]
    dsmim("shards", "build", tars, tmp_path / "same", "--no-shuffle", "--per-shard", 5, "--name", "x")
    assert [k for index in open_shards(str(tmp_path / "same")) for k in index.table().keys] == orders[0]


def test_shrinking_uses_the_given_quality_and_keeps_small_images(tmp_path):
    members = [("big.jpg", image_bytes(1, side=90, kind="JPEG")), ("small.jpg", image_bytes(2, side=20, kind="JPEG"))]
    write_index(write_tar(tmp_path / "t.tar", members))
    sizes = {}
    for quality in (50, 95):
        out = tmp_path / str(quality)
        dsmim("shards", "build", tmp_path / "t.tar", out, "--short-side", 30, "--quality", quality)
        found = samples_of(out)
        assert found["small"]["jpg"] == members[1][1]
        assert min(decode(found["big"]["jpg"]).shape[1:]) == 30
        sizes[quality] = len(found["big"]["jpg"])
        assert json.loads((out / "data.build.json").read_text())["quality"] == quality
    assert sizes[50] < sizes[95]


def test_undecodable_images_are_an_error_or_left_out_and_named(tars, tmp_path):
    write_index(write_tar(tars / "u.tar", [("bad.png", b"damage"), ("good.png", image_bytes(1))]))
    done = dsmim("shards", "build", tars, tmp_path / "a", "--short-side", 16, check=False)
    assert done.returncode == 1 and "bad.png: cannot be decoded" in done.stderr and "--skip-undecodable" in done.stderr
    done = dsmim("shards", "build", tars, tmp_path / "b", "--skip-undecodable")
    assert "left out: bad.png" in done.stdout and "10 images in 1 shards" in done.stdout
    assert dsmim("shards", "build", tars, tmp_path / "c").returncode == 0  # original bytes are not decoded


def test_images_of_too_many_pixels(tmp_path, recwarn):
    """Where Pillow would warn, and where it would raise; a larger limit continues the build."""
    assert WriteOptions().max_pixels == 178_956_970  # above it Pillow's own limit has always been an error
    sides = {"a{0}.png": 20, "b.png": 30, "c.png": 40}  # 400, 900 and 1600 pixels
    write_index(write_tar(tmp_path / "t.tar", [(name, image_bytes(0, side)) for name, side in sides.items()]))
    sources = split_sources(read_sources(str(tmp_path / "t.tar"))[0], {}, None)

    def build(out: str, **options):
        return build_shards(sources, tmp_path / out, [], WriteOptions(per_shard=1, short_side=16, **options))

    for limit, first in ((1599, "c.png: cannot be decoded: 1600"), (700, "b.png: cannot be decoded: 900")):
        with pytest.raises(ValueError, match=f"{first} pixels are more than {limit}: give a larger --max-pixels"):
            build(str(limit), max_pixels=limit)
        assert build(str(limit), max_pixels=1600).written == (1 if limit == 1599 else 2)
    assert build("some", max_pixels=700, skip_undecodable=True).left_out == [
        f"{name}: {pixels} pixels are more than 700: give a larger --max-pixels if you trust the file"
        for name, pixels in (("b.png", 900), ("c.png", 1600))
    ]
    with pytest.raises(ValueError, match="from a build that differs in max_pixels"):
        build("some", skip_undecodable=True)
    assert not recwarn.list
    command = ["shards", "build", str(tmp_path / "t.tar"), str(tmp_path / "out"), "--max-pixels", "9"]
    assert main(command) == 1
    assert main([*command, "--short-side", "16", "--workers", "1"]) == 1


def test_a_shard_whose_images_are_all_left_out_is_not_written(tmp_path):
    members = [(f"{i}.png", b"damage" if i == 4 else image_bytes(i)) for i in range(5)]
    write_index(write_tar(tmp_path / "t.tar", members))
    words = ["shards", "build", tmp_path / "t.tar", tmp_path / "out", "--no-shuffle", "--per-shard", 2]
    for _ in range(2):
        assert "4 images in 2 shards" in dsmim(*words, "--skip-undecodable").stdout
    assert len(list((tmp_path / "out").glob("*.tar"))) == 2


def test_all_members_are_kept_and_two_images_of_one_name_are_an_error(tmp_path):
    members = [("a._note", b"1"), ("a.jpg", image_bytes(0, 60, "JPEG")), ("a.webp", image_bytes(1, 60, "WEBP"))]
    write_index(write_tar(tmp_path / "t.tar", members))
    dsmim("shards", "build", tmp_path / "t.tar", tmp_path / "a")
    assert samples_of(tmp_path / "a")["a"] == {name[2:]: data for name, data in members}
    done = dsmim("shards", "build", tmp_path / "t.tar", tmp_path / "b", "--short-side", 30, check=False)
    assert done.returncode == 1 and "contains two images that would both become a.jpg" in done.stderr


def test_class_folders_may_be_links_and_two_builds_share_one_list_of_classes(tmp_path):
    for name in "abc":
        (tmp_path / "all" / name).mkdir(parents=True)
        (tmp_path / "all" / name / f"{name}0.png").write_bytes(image_bytes(ord(name)))
    for chosen in ("ab", "bc"):
        (tmp_path / chosen).mkdir()
        for name in chosen:
            (tmp_path / chosen / name).symlink_to(tmp_path / "all" / name)
    dsmim("shards", "build", tmp_path / "ab", tmp_path / "out", "--name", "train")
    assert set(samples_of(tmp_path / "out")) == {"a/a0", "b/b0"}
    done = dsmim("shards", "build", tmp_path / "bc", tmp_path / "out", "--name", "val", check=False)
    assert done.returncode == 1 and "does not list 1 of the 2 classes here (c)" in done.stderr
    dsmim("shards", "build", tmp_path / "ab", tmp_path / "out", "--name", "val-hard")
    dsmim("shards", "build", tmp_path / "ab", tmp_path / "out", "--name", "val")


def test_a_tar_that_changed_since_it_was_indexed_is_named(tars, tmp_path):
    sources = read_sources(str(tars))[0]
    write_tar(tars / "t-1.tar", [(f"x{i}.png", image_bytes(i)) for i in range(12)])
    with pytest.raises(ValueError, match=r"t-1\.tar: has changed since it was indexed"):
        build_shards(split_sources(sources, {}, 0), tmp_path / "out", [])


def test_killed_at_any_moment_it_leaves_whole_shards_and_resumes(tmp_path):
    """SIGKILL to the command: its workers end with it, every file under a final name is whole, and the same command
    again ends with the very bytes of an uninterrupted build."""
    for i in range(60):
        path = tmp_path / f"images/{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(image_bytes(i, side=150))
    words = ["shards", "build", tmp_path / "images", tmp_path / "out", "--per-shard", 5, "--short-side", 100]
    build_shards(
        split_sources(read_sources(str(tmp_path / "images"))[0], {}, 0), tmp_path / "whole", [], WriteOptions(5, 100)
    )
    killed, found, chance = 0, set(), random.Random(0)
    for _ in range(4):
        process = subprocess.Popen(
            ["dsmim", *map(str, words), "--workers", "2"], env=environment(), start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        before = len(list((tmp_path / "out").glob("*.tar")))
        while process.poll() is None and len(list((tmp_path / "out").glob("*.tar"))) <= before:
            time.sleep(0.005)
        time.sleep(chance.random() / 50)
        killed += process.poll() is None
        process.kill()
        process.wait()
        with suppress(ProcessLookupError):  # the workers are its process group
            while True:
                os.killpg(process.pid, 0)
                time.sleep(0.005)
        for tar in (tmp_path / "out").glob("*.tar"):
            assert tar.read_bytes() == (tmp_path / "whole" / tar.name).read_bytes()
            found.add(tar.name)
    assert killed and found
    dsmim(*words)
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names  # no temporary file is left either
    for name in names:
        if name.endswith(".tar"):
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
            assert read_index(tmp_path / "out" / name).samples == 5


def test_two_builds_into_one_folder_do_not_mix(tars, tmp_path):
    (tmp_path / "out").mkdir()
    with (tmp_path / "out/.build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another dsmim shards build is writing there"):
            build_shards(split_sources(read_sources(str(tars))[0], {}, 0), tmp_path / "out", [])
