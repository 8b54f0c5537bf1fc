"""`dsmim shards build` from tars, killed and run again; `verify --report`."""

import json
import os
import random
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from dsmim.data.decode import decode
from dsmim.packing.sources import filter_sources, read_sources, split_sources
from dsmim.packing.verify import verify, verify_all
from dsmim.packing.writer import Writing, build
from dsmim.shards.index import read_index, write_index
from dsmim.shards.opening import open_shards
from tests.conftest import dsmim, environment, image_bytes, make_shards, write_tar
from tests.shards.test_opening import samples_of


@pytest.fixture
def tars(tmp_path) -> Path:
    """Three tars of 9 labelled samples with a further member each."""
    for shard in range(3):
        members = []
        for i in range(3 * shard, 3 * shard + 3):
            members += [(f"k{i}.png", image_bytes(i)), (f"k{i}.cls", b"%d" % (i % 2)), (f"k{i}.json", b'{"i":%d}' % i)]
        write_index(write_tar(tmp_path / f"tars/t-{shard}.tar", members))
    return tmp_path / "tars"


def test_tars_are_sharded_anew_with_all_members(tars, tmp_path):
    done = dsmim("shards", "build", f"{tars}/t-*.tar", tmp_path / "out", "--per-shard", 4)
    assert "9 images in 3 shards" in done.stdout
    assert samples_of(tmp_path / "out") == samples_of(tars)
    orders = [[key for index in open_shards(str(p)) for key in index.table().keys] for p in (tars, tmp_path / "out")]
    assert orders[0] != orders[1]
    dsmim("shards", "build", tars, tmp_path / "same", "--no-shuffle", "--per-shard", 5, "--name", "x")
    assert [k for index in open_shards(str(tmp_path / "same")) for k in index.table().keys] == orders[0]


def test_filters(tars, tmp_path):
    (tmp_path / "some.txt").write_text("k1\nk4\tt-1.tar\nk8\n")
    dsmim("shards", "build", tars, tmp_path / "a", "--keys", tmp_path / "some.txt")
    assert set(samples_of(tmp_path / "a")) == {"k1", "k4", "k8"}
    dsmim("shards", "build", tars, tmp_path / "b", "--without", tmp_path / "some.txt")
    assert set(samples_of(tmp_path / "b")) == {f"k{i}" for i in (0, 2, 3, 5, 6, 7)}
    sources = read_sources(str(tars))[0]
    with pytest.raises(ValueError, match=r"1 keys are not in the source, such as \['none'\]"):
        filter_sources(sources, ["k1", "none"], None)
    with pytest.raises(ValueError, match="leave no image"):
        filter_sources(sources, ["k1"], ["k1"])


def test_shrinking_has_a_stated_quality_and_leaves_small_images_alone(tmp_path):
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


def test_undecodable_images_are_an_error_or_left_out_by_name(tars, tmp_path):
    write_index(write_tar(tars / "u.tar", [("bad.png", b"rubbish"), ("good.png", image_bytes(1))]))
    done = dsmim("shards", "build", tars, tmp_path / "a", "--short-side", 16, check=False)
    assert done.returncode == 1 and "bad.png: cannot be decoded" in done.stderr and "--skip-undecodable" in done.stderr
    done = dsmim("shards", "build", tars, tmp_path / "b", "--skip-undecodable")
    assert "left out: bad.png" in done.stdout and "10 images in 1 shards" in done.stdout
    assert dsmim("shards", "build", tars, tmp_path / "c").returncode == 0  # original bytes: nobody looks at them


def test_a_shard_of_which_nothing_is_left_is_no_shard(tmp_path):
    members = [(f"{i}.png", b"rubbish" if i == 4 else image_bytes(i)) for i in range(5)]
    write_index(write_tar(tmp_path / "t.tar", members))
    words = ["shards", "build", tmp_path / "t.tar", tmp_path / "out", "--no-shuffle", "--per-shard", 2]
    for _ in range(2):
        assert "4 images in 2 shards" in dsmim(*words, "--skip-undecodable").stdout
    assert len(list((tmp_path / "out").glob("*.tar"))) == 2


def test_members_that_would_be_lost_are_an_error_or_kept(tmp_path):
    members = [("a._note", b"1"), ("a.jpg", image_bytes(0, 60, "JPEG")), ("a.webp", image_bytes(1, 60, "WEBP"))]
    write_index(write_tar(tmp_path / "t.tar", members))
    dsmim("shards", "build", tmp_path / "t.tar", tmp_path / "a")
    assert samples_of(tmp_path / "a")["a"] == {name[2:]: data for name, data in members}
    done = dsmim("shards", "build", tmp_path / "t.tar", tmp_path / "b", "--short-side", 30, check=False)
    assert done.returncode == 1 and "holds two images that would become a.jpg" in done.stderr


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
    assert done.returncode == 1 and "lists other classes, with other numbers" in done.stderr
    dsmim("shards", "build", tmp_path / "ab", tmp_path / "out", "--name", "val-hard")
    dsmim("shards", "build", tmp_path / "ab", tmp_path / "out", "--name", "val")


def test_a_table_from_a_spreadsheet(tmp_path):
    (tmp_path / "a,b.png").write_bytes(image_bytes(0))
    (tmp_path / "t.csv").write_bytes(b'\xef\xbb\xbfpath,label\r\n"a,b.png",3\r\n')
    sources, _ = read_sources(str(tmp_path / "t.csv"))
    assert [(source.key, source.label) for source in sources] == [("a,b", 3)]


def test_tars_without_an_index_and_remote_ones_are_refused(tmp_path):
    write_tar(tmp_path / "t.tar", [("a.png", image_bytes(0))])
    for source, message in [(f"{tmp_path}/t.tar", "has no index"), ("s3://b/{0..1}.tar", "built from local tars")]:
        with pytest.raises(ValueError, match=message):
            read_sources(source)


def test_a_tar_that_changed_since_it_was_indexed_is_named(tars, tmp_path):
    sources = read_sources(str(tars))[0]
    write_tar(tars / "t-1.tar", [(f"x{i}.png", image_bytes(i)) for i in range(12)])
    with pytest.raises(ValueError, match=r"t-1\.tar: has changed since it was indexed"):
        build(split_sources(sources, {}, 0), tmp_path / "out", [])


def test_killed_at_any_moment_it_leaves_whole_shards_and_resumes(tmp_path):
    """SIGKILL to the command: its workers end with it, every file under a final name is whole, and the same command
    again ends with the very bytes of an uninterrupted build."""
    for i in range(60):
        path = tmp_path / f"images/{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(image_bytes(i, side=150))
    words = ["shards", "build", tmp_path / "images", tmp_path / "out", "--per-shard", 5, "--short-side", 100]
    build(split_sources(read_sources(str(tmp_path / "images"))[0], {}, 0), tmp_path / "whole", [], Writing(5, 100))
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
    import fcntl

    (tmp_path / "out").mkdir()
    with (tmp_path / "out/.build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another dsmim shards build is writing there"):
            build(split_sources(read_sources(str(tars))[0], {}, 0), tmp_path / "out", [])


def test_a_report_saves_checking_again(tmp_path):
    paths = [str(path) for path in make_shards(tmp_path, [2, 2])]
    report = tmp_path / "report.jsonl"
    assert verify_all(paths, None, 1, False, report) == []
    os.utime(paths[1])  # touched: checked again
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert [line["shard"] for line in lines] == paths
    report.write_text(json.dumps(lines[0] | {"problems": ["as reported"]}) + "\n" + json.dumps(lines[1]) + "\n")
    assert verify_all(paths, None, 1, False, report)[0] == "as reported"
    assert len(report.read_text().splitlines()) == 3
    assert "as reported" not in verify_all(paths, None, 1, True, report)  # not decoded then
    lines = report.read_bytes()
    report.write_bytes(lines + b'{"shard": "cut of')  # the command was killed while it wrote
    verify_all(paths, None, 1, False, report)
    assert report.read_bytes() == lines  # nothing was checked again
    Path(f"{paths[0]}.dsmi").unlink()
    assert "has no index" in verify_all(paths, None, 1, False, report)[0]
    report.write_text("no report\n")
    with pytest.raises(ValueError, match="is no report of dsmim shards verify"):
        verify_all(paths, None, 1, False, report)


def test_verify_finds_structural_damage_without_an_index(tmp_path):
    path = make_shards(tmp_path, [4])[0]
    broken = tmp_path / "broken.tar"
    broken.write_bytes(path.read_bytes()[:3000])
    problems = verify(str(broken))
    assert len(problems) == 2 and "has no index" in problems[0] and "cut short" in problems[1]
