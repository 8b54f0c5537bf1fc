"""A build that is run again after its images have changed on disk."""

import json
import os

import pytest

from dsmim.packing.sources import read_sources, split_sources
from dsmim.packing.writer import WriteOptions, build_shards
from dsmim.shards.index import write_index
from tests.conftest import dsmim, image_bytes, write_tar
from tests.packing.contents import samples_of


def build(source, out, **options):
    return build_shards(split_sources(read_sources(str(source)).sources, {}, 0), out, [], WriteOptions(3, **options))


def images_of(pattern) -> dict[str, bytes]:
    return {key: members["png"] for key, members in samples_of(pattern).items()}


def on_disk(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder).with_suffix("")): path.read_bytes() for path in folder.rglob("*.png")}


def test_only_the_shards_of_changed_images_are_built_again_and_said(folder, tmp_path):
    words = ("shards", "build", folder, tmp_path / "out", "--per-shard", 3)
    image, whole = folder / "cat/3.png", (folder / "cat/3.png").read_bytes()
    image.write_bytes(whole[:100])  # a broken download
    dsmim(*words)
    assert dsmim("shards", "verify", tmp_path / "out", "--decode", check=False).returncode == 1
    image.write_bytes(whole)
    done = dsmim(*words)
    (tar,) = [path.name for path in (tmp_path / "out").glob("*.tar") if "cat/3" in samples_of(path)]
    assert f"built again, because their images have changed: {tar}\n" in done.stdout and "3 kept" in done.stdout
    assert images_of(tmp_path / "out") == on_disk(folder)
    assert dsmim("shards", "verify", tmp_path / "out", "--decode").returncode == 0
    assert "built again" not in dsmim(*words).stdout


def test_a_change_that_keeps_the_size(folder, tmp_path):
    build(folder, tmp_path / "out")
    image = folder / "dog/0.png"
    image.write_bytes(image.read_bytes()[::-1])
    assert len(build(folder, tmp_path / "out").renewed) == 1
    assert images_of(tmp_path / "out") == on_disk(folder)


def test_after_a_failure_the_changed_shards_are_still_built_again(folder, tmp_path):
    build(folder, tmp_path / "out", short_side=64)
    image, whole = folder / "dog/0.png", image_bytes(99)
    image.write_bytes(b"damage")
    with pytest.raises(ValueError, match=r"dog/0\.png: cannot be decoded"):
        build(folder, tmp_path / "out", short_side=64)
    image.write_bytes(whole)
    assert build(folder, tmp_path / "out", short_side=64).written == 1
    assert images_of(tmp_path / "out")["dog/0"] == whole


def test_an_image_that_was_left_out_is_packed_when_it_is_whole(folder, tmp_path):
    image, whole = folder / "dog/0.png", (folder / "dog/0.png").read_bytes()
    image.write_bytes(b"damage")
    assert build(folder, tmp_path / "out", skip_undecodable=True).left_out
    image.write_bytes(whole)
    assert not build(folder, tmp_path / "out", skip_undecodable=True).left_out
    assert images_of(tmp_path / "out") == on_disk(folder)


def test_a_shard_whose_images_are_all_damaged_now_is_removed(folder, tmp_path):
    sources = read_sources(str(folder)).sources[:3]
    build_shards({"data": sources}, tmp_path / "out", [], WriteOptions(3, skip_undecodable=True))
    for source in sources:
        source.path.write_bytes(b"damage")
    sources = read_sources(str(folder)).sources[:3]
    built = build_shards({"data": sources}, tmp_path / "out", [], WriteOptions(3, skip_undecodable=True))
    assert not built.shards and len(built.left_out) == 3 and not list((tmp_path / "out").glob("*.tar*"))


def test_builds_of_older_versions_are_continued(folder, tmp_path):
    """Their plans hold no stamps: images that are newer than their shard have changed."""
    build(folder, tmp_path / "out")
    plan, times = tmp_path / "out/data.build.json", {}
    for path in (tmp_path / "out").glob("*.tar"):
        times[path.name] = path.stat().st_mtime_ns
    plan.write_text(json.dumps({k: v for k, v in json.loads(plan.read_text()).items() if k != "stamps"}))
    assert build(folder, tmp_path / "out").written == 0
    plan.write_text(json.dumps({k: v for k, v in json.loads(plan.read_text()).items() if k != "stamps"}))
    image = folder / "cat/1.png"
    image.write_bytes(image_bytes(99))
    os.utime(image, ns=(max(times.values()) + 10**9,) * 2)
    assert len(build(folder, tmp_path / "out").renewed) == 1
    assert images_of(tmp_path / "out") == on_disk(folder)


def test_an_image_that_changes_while_the_build_runs_is_an_error(folder, tmp_path):
    sources = read_sources(str(folder)).sources
    (folder / "cat/1.png").write_bytes(image_bytes(99))
    with pytest.raises(ValueError, match=r"cat/1\.png: has changed since the build began; run the same command again"):
        build_shards({"data": sources}, tmp_path / "out", [])
    build(folder, tmp_path / "out2")


def test_a_source_tar_whose_samples_have_changed_and_kept_their_places(tmp_path):
    for number in (1, 2):
        write_tar(tmp_path / "t.tar", [("a.png", b"%d" % number), ("b.png", b"x")])
        write_index(tmp_path / "t.tar")
        built = build(tmp_path / "t.tar", tmp_path / "out")
    assert built.renewed == ["data-000000.tar"] and images_of(tmp_path / "out") == {"a": b"2", "b": b"x"}
