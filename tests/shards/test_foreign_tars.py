"""Tars of other tools: their names, links, compression, and what index says about files that it leaves out."""

import gzip
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from dsmim.data.reader import DataError, ShardReader
from dsmim.packing.verify import verify_shard
from dsmim.shards.index import PAGE, read_index, write_index
from dsmim.shards.names import split_member
from dsmim.shards.opening import open_shards
from dsmim.shards.scan import scan
from tests.conftest import dsmim, image_bytes, write_tar


def loose(folder: Path, names: list[str], numbers: bool = True) -> Path:
    """A folder of images, numbered in the order of their names, with their class numbers 0 and 1."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(number))
        if numbers:
            path.with_suffix(".cls").write_text(str(number % 2))
    return folder


def gnu(tar: Path, folder: Path, what: str = ".") -> Path:
    subprocess.run(["tar", "--sort=name", "-cf", tar, "-C", folder, what], check=True)
    return tar


def sample(index, key: str) -> dict[str, bytes]:
    row = index.table().keys.index(key)
    found, members = ShardReader([index]).read(0, row)
    assert found == key
    return {extension: bytes(data) for extension, data in members.items()}


@pytest.mark.parametrize(
    "name", ["pics/._0.jpg", ".hidden.jpg", "a/b/.x.y.jpg", "__m__/x.jpg", "./__m__/x.jpg", "__m__"]
)
def test_names_that_are_no_samples(name):
    assert split_member(name) is None


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("./a/b.jpg", ("a/b", "jpg")),
        ("a/__m__/x.jpg", ("a/__m__/x", "jpg")),
        ("__MACOSX/x.jpg", ("__MACOSX/x", "jpg")),
        ("a.b/c.d.jpg", ("a.b/c", "d.jpg")),
        ("a.b/c", None),
    ],
)
def test_names_that_are_split_as_webdataset_does(name, parts):
    assert split_member(name) == parts


def test_lists_of_keys_with_and_without_the_leading_dot(tmp_path):
    """webdataset and HF datasets keep the './' of `tar -cf t.tar .`; both forms find the sample."""
    gnu(tmp_path / "t.tar", loose(tmp_path / "pics", ["a/1.png", "a/2.png", "a/3.png"]))
    dsmim("shards", "index", tmp_path / "t.tar")
    (tmp_path / "list.txt").write_text("./a/1\na/3\n")
    assert "2 of 3 samples" in dsmim("shards", "subset", tmp_path / "t.tar", tmp_path / "list.txt").stdout
    shards = open_shards(str(tmp_path / "t.tar"), subset=str(tmp_path / "list.txt"))
    assert shards[0].table().keys == ["a/1", "a/3"]
    dsmim("shards", "build", tmp_path / "t.tar", tmp_path / "out", "--keys", tmp_path / "list.txt")
    assert sorted(open_shards(str(tmp_path / "out"))[0].table().keys) == ["a/1", "a/3"]
    names = subprocess.run(
        ["tar", "-tf", tmp_path / "t.tar", "--wildcards", "--no-anchored", "a/1.*"], check=True, capture_output=True
    )
    assert names.stdout.decode().split() == ["./a/1.cls", "./a/1.png"]  # the command of docs/data.md


def test_hidden_files_and_meta_folders_are_counted_and_left_out(tmp_path):
    members = [(f"pics/{part}{i}.png", image_bytes(i)) for i in range(3) for part in ("._", "")]
    write_tar(tmp_path / "t.tar", [("__m__/x.json", b"{}"), ("README", b"x"), *members])
    said = dsmim("shards", "index", tmp_path / "t.tar").stdout
    assert read_index(tmp_path / "t.tar").table().keys == ["pics/0", "pics/1", "pics/2"]
    assert (
        "5 left out: hidden 3 (pics/._0.png), in __…__ folders 1 (__m__/x.json), without extension 1 (README)" in said
    )


def test_samples_without_a_known_image_are_counted(tmp_path):
    members = [(f"s{i}.png" if i < 3 else f"s{i}.input.jpg", image_bytes(i)) for i in range(6)]
    write_tar(tmp_path / "t.tar", members)
    said = dsmim("shards", "index", tmp_path / "t.tar").stdout
    assert "1 shards, 3 samples" in said and "3 left out: .input.jpg 3 (s3.input.jpg)" in said


def test_a_tar_without_a_known_image_says_what_it_holds(tmp_path):
    write_tar(tmp_path / "t.tar", [(f"s{i}.input.jpg", image_bytes(i)) for i in range(6)])
    with pytest.raises(ValueError, match=r"its files: \.input\.jpg 6 \(s0\.input\.jpg\); .*--image-key"):
        write_index(tmp_path / "t.tar")
    write_tar(tmp_path / "u.tar", [("n01.tar", b"x"), ("n02.tar", b"x")])
    with pytest.raises(ValueError, match="unpack it, and index the tars in it"):
        write_index(tmp_path / "u.tar")


@pytest.mark.parametrize(
    ("names", "before", "name"),
    [
        (["cat.0", "cat.1", "dog.0"], r"contains no image .*--image-key EXTENSION", "cat.0"),
        (["cat.0", "dog.0", "cat.1"], r"key 'x/cat' occurs twice; .*", "cat.1"),
    ],
)
def test_names_with_more_dots_than_that_of_the_extension(tmp_path, names, before, name):
    write_tar(tmp_path / "t.tar", [(f"x/{name}.jpg", image_bytes(0)) for name in names])
    dots = (
        rf"\. A key ends at the first dot .*, so {name}\.jpg is the member .* \(such as {name.replace('.', '_')}\.jpg\)"
    )
    with pytest.raises(ValueError, match=before + dots):
        write_index(tmp_path / "t.tar")


def linked(tmp_path, links: list[tuple[str, str]]) -> Path:
    """A tar by GNU tar of a folder in which the second name of each pair is a hard link to the first."""
    folder = loose(tmp_path / "pics", ["x/1.png", "x/2.png"])
    for old, new in links:
        os.link(folder / old, folder / new)
    return gnu(tmp_path / "t.tar", folder)


def test_hard_links_have_the_bytes_of_the_earlier_member(tmp_path):
    tar = linked(
        tmp_path, [("x/1.png", "x/7.png"), ("x/2.cls", "x/7.cls"), ("x/2.png", "x/8.png"), ("x/1.png", "x/9.png")]
    )
    with tarfile.open(tar) as archive:
        assert sum(member.islnk() for member in archive) == 4
    index = write_index(tar)
    assert index.table().keys == ["x/1", "x/2", "x/7", "x/8", "x/9"]
    assert index.table().labels.tolist() == [0, 1, 1, -1, -1]
    assert sample(index, "x/7") == {"png": image_bytes(0), "cls": b"1"}
    assert sample(index, "x/8") == {"png": image_bytes(1)} and sample(index, "x/9") == {"png": image_bytes(0)}
    assert verify_shard(str(tar), decode_images=True).problems == [
        f"{tar}: 2 of 5 samples have no class number (KEY.cls), the first x/8"
    ]
    later = tar.stat().st_mtime_ns + 10**10
    os.utime(tar, ns=(later, later))
    assert read_index(tar).samples == 5  # copied without its times: the first, middle and last sample are compared


def test_hard_links_survive_a_subset_and_a_build(tmp_path):
    tar = linked(tmp_path, [("x/1.png", "x/7.png")])
    write_index(tar)
    (tmp_path / "list.txt").write_text("x/7\n")
    dsmim("shards", "subset", tar, tmp_path / "list.txt")
    reader = ShardReader(open_shards(str(tar), subset=str(tmp_path / "list.txt")))
    assert bytes(reader.read(0, 0)[1]["png"]) == image_bytes(0)
    dsmim("shards", "build", tar, tmp_path / "out", "--keys", tmp_path / "list.txt")
    built = open_shards(str(tmp_path / "out"))[0]
    assert sample(built, "x/7") == {"png": image_bytes(0)} and not built.table().links


def test_a_hard_link_whose_target_is_damaged_later_is_noticed(tmp_path):
    tar = linked(tmp_path, [("x/1.png", "x/7.png")])
    index = write_index(tar)
    (link,) = index.table().links[2]
    with tar.open("r+b") as file:
        file.seek(link.offset)
        file.write(b"\1" * 300)
    with pytest.raises(DataError, match="has changed since it was indexed"):
        ShardReader([index]).read(0, 2)


def test_links_that_cannot_be_followed(tmp_path):
    folder = loose(tmp_path / "pics", ["1.png", "2.png"])
    (folder / "2.png").unlink()
    (folder / "2.png").symlink_to("store")
    (folder / "3.png").symlink_to("store")
    with pytest.raises(ValueError, match=r"symbolic links .*: 2, such as \./2\.png to store; .* tar --dereference"):
        write_index(gnu(tmp_path / "t.tar", folder))
    with tarfile.open(tmp_path / "u.tar", "w") as archive:
        member = tarfile.TarInfo("a.jpg")
        member.type, member.linkname = tarfile.LNKTYPE, "elsewhere.jpg"
        archive.addfile(member)
    with pytest.raises(ValueError, match=r"a\.jpg is a hard link to elsewhere\.jpg, which is not before it"):
        write_index(tmp_path / "u.tar")


def test_an_index_of_the_version_before_is_valid(tmp_path):
    """It has no counts of labels and no third part."""
    tar = write_tar(tmp_path / "t.tar", [("a.png", image_bytes(0)), ("a.cls", b"1"), ("b.png", image_bytes(1))])
    index = write_index(tar)
    assert (index.unlabelled, index.highest) == (1, 1)
    sidecar = Path(index.file)
    data = sidecar.read_bytes()
    page = data[:PAGE].replace(b', "extra_bytes": 0, "unlabelled": 1, "highest": 1, "variant": ""', b"")
    assert len(page) < PAGE
    sidecar.write_bytes(page.ljust(PAGE) + data[PAGE:])
    old = read_index(tar)
    assert (old.unlabelled, old.highest) == (None, None) and old.table().labels.tolist() == [1, -1]
    assert old.labels().tolist() == [1, -1]


def test_compressed_tars_say_how_to_unpack_them(tmp_path):
    tar = write_tar(tmp_path / "t.tar", [("a.png", image_bytes(0))])
    (tmp_path / "t.tar.gz").write_bytes(gzip.compress(tar.read_bytes()))
    with pytest.raises(ValueError, match=r"t\.tar\.gz: is compressed \(gzip\); .* gunzip < .*t\.tar\.gz"):
        write_index(tmp_path / "t.tar.gz")


def test_a_second_tar_behind_the_end_of_the_first_is_not_lost_silently(tmp_path):
    parts = [write_tar(tmp_path / f"{n}.tar", [(f"{n}.png", image_bytes(n))]) for n in (0, 1)]
    (tmp_path / "t.tar").write_bytes(b"".join(part.read_bytes() for part in parts))
    with pytest.raises(ValueError, match=r"another tar begins at byte .* tar --concatenate"):
        scan(tmp_path / "t.tar", "t.tar")
