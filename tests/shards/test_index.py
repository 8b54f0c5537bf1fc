"""The tar index: WebDataset shards of any tool, and errors that name what is damaged."""

import io
import os
import subprocess
import tarfile
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmim.data.order import stream_key
from dsmim.data.reader import ShardReader
from dsmim.shards.index import fingerprint, read_index, write_index
from dsmim.shards.names import split_member
from dsmim.shards.opening import expand, index_all, open_shards
from dsmim.shards.sidecar import index_file as index_name
from dsmim.shards.subset import choose, find, read_list, write_list
from dsmim.shards.tar import parse_sample
from tests.conftest import image_bytes, make_shards, write_tar


def index_file(tar):
    return Path(index_name(str(tar)))


def read_all(index):
    data, table = Path(index.tar).read_bytes(), index.table()
    places = [table.place(row) for row in range(index.samples)]
    samples = [parse_sample(data[offset : offset + length]) for offset, length in places]
    assert [key for key, _ in samples] == table.keys
    return samples


def test_shards_of_webdataset_and_gnu_tar_unmodified(tmp_path):
    ours = {f"dir/sample{i}": image_bytes(i) for i in range(4)}
    theirs = tmp_path / "wds.tar"
    with webdataset.TarWriter(str(theirs)) as writer:
        for key, data in ours.items():
            writer.write({"__key__": key, "png": data, "cls": 1, "json": {"a": 1}})
    loose = tmp_path / "loose"
    for key, data in ours.items():
        (loose / key).parent.mkdir(parents=True, exist_ok=True)
        (loose / f"{key}.png").write_bytes(data)
        (loose / f"{key}.cls").write_text("1")
    gnu = tmp_path / "gnu.tar"
    subprocess.run(["tar", "--sort=name", "-cf", gnu, "-C", loose, "."], check=True)
    for path in (theirs, gnu):
        samples = read_all(write_index(path))
        assert {key: members["png"] for key, members in samples} == ours
        assert all(members["cls"] == b"1" for _, members in samples)


def test_our_shards_open_in_webdataset(tmp_path):
    path = make_shards(tmp_path, [5])[0]
    keys = [sample["__key__"] for sample in webdataset.WebDataset(str(path), shardshuffle=False)]
    assert keys == [key for key, _ in read_all(read_index(path))]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names(tmp_path, format):
    key = "folder/" + "x" * 150
    with tarfile.open(tmp_path / "long.tar", "w", format=format) as archive:
        for name in (f"{key}.jpg", f"{key}.cls", "short.jpg"):
            (tmp_path / "one").write_bytes(b"7")
            archive.add(tmp_path / "one", arcname=name)
    assert [key for key, _ in read_all(write_index(tmp_path / "long.tar"))] == [key, "short"]


@given(st.lists(st.lists(st.sampled_from(["jpg", "cls", "json", "seg.png"]), min_size=1, unique=True), min_size=1))
@settings(max_examples=30, deadline=None)
def test_samples_are_runs_of_one_key_with_an_image(tmp_path_factory, groups):
    path = tmp_path_factory.mktemp("t") / "t.tar"
    members = [(f"s{i}.{e}", f"{i}{e}".encode() * i) for i, extensions in enumerate(groups) for e in extensions]
    write_tar(path, members)
    wanted = [f"s{i}" for i, extensions in enumerate(groups) if "jpg" in extensions]
    if not wanted:
        with pytest.raises(ValueError, match="contains no image"):
            write_index(path)
        return
    samples = read_all(write_index(path))
    assert [key for key, _ in samples] == wanted
    for key, got in samples:
        assert got == {e: f"{key[1:]}{e}".encode() * int(key[1:]) for e in groups[int(key[1:])]}


def test_member_names():
    assert split_member("a/b.c/d.seg.png") == ("a/b.c/d", "seg.png")
    assert split_member("./x.JPG") == ("x", "jpg")
    assert split_member("README") is None and split_member(".hidden") is None


def test_an_index_older_than_its_tar(tmp_path):
    """Copied without its times, the tar is valid; written again with the same size, it is not."""
    path = make_shards(tmp_path, [3])[0]
    size, stamp = path.stat().st_size, index_file(path).stat().st_mtime_ns + 10**9
    os.utime(path, ns=(stamp, stamp))
    assert read_index(path).samples == 3
    write_tar(path, [(f"x{i}.png", image_bytes(i)) for i in range(3)])
    path.write_bytes(path.read_bytes().ljust(size, b"\0")[:size])
    os.utime(path, ns=(stamp, stamp))
    with pytest.raises(ValueError, match=f"index is older than its tar.*dsmim shards index {path}"):
        read_index(path)


def test_missing_foreign_and_cut_indexes(tmp_path):
    path = make_shards(tmp_path, [3])[0]
    sidecar = index_file(path)
    whole = sidecar.read_bytes()
    sidecar.write_bytes(whole[:-3])
    with pytest.raises(ValueError, match="was cut short"):
        read_index(path)
    sidecar.write_text("{}")
    with pytest.raises(ValueError, match="is no dsmim index"):
        read_index(path)
    sidecar.unlink()
    with pytest.raises(ValueError, match="has no index"):
        read_index(path)


def test_a_tar_that_was_cut_after_indexing(tmp_path):
    path = make_shards(tmp_path, [3])[0]
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(ValueError, match=r"has 1500 bytes of the .* truncated"):
        read_index(path)


@pytest.mark.parametrize("cut", [100, 700, 3000, 10**6])
def test_truncated_tar(tmp_path, cut):
    path = write_tar(tmp_path / "t.tar", [(f"{i}.png", image_bytes(i)) for i in range(4)])
    data = path.read_bytes()
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
        end = last.offset_data + -(-last.size // 512) * 512  # all members whole, the end-of-archive mark missing
    path.write_bytes(data[: min(cut, end)])
    with pytest.raises(ValueError, match=r"t\.tar: (cut short|no readable tar|contains no image)"):
        write_index(path)


def test_damaged_header_in_the_middle(tmp_path):
    path = write_tar(tmp_path / "t.tar", [(f"{i}.png", image_bytes(i)) for i in range(4)])
    with tarfile.open(path) as archive:
        offset = archive.getmembers()[2].offset
    data = bytearray(path.read_bytes())
    data[offset + 10] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"bad tar header at byte {offset}"):
        write_index(path)


def test_key_in_two_places(tmp_path):
    path = write_tar(tmp_path / "t.tar", [("a.png", b"1"), ("b.png", b"2"), ("a.cls", b"0")])
    with pytest.raises(ValueError, match="key 'a' occurs twice"):
        write_index(path)


def test_fingerprint_follows_contents_and_order(tmp_path):
    make_shards(tmp_path, [3, 4])
    first, second = (read_index(p) for p in expand(str(tmp_path)))
    assert len({fingerprint(shards) for shards in ([first, second], [second, first], [first])}) == 3


def test_the_fingerprint_ignores_the_signature_of_an_address(tmp_path):
    make_shards(tmp_path, [3])
    index = read_index(tmp_path / "train-000.tar")
    signed = [replace(index, tar=f"https://host/a/train-000.tar?Sig={sig}/x") for sig in ("aa", "bb")]
    assert {fingerprint([one]) for one in signed} == {fingerprint([index])}
    assert len({index_name(one.tar, tmp_path) for one in signed}) == 1


def test_a_size_that_is_no_number_is_damage(tmp_path):
    data = bytearray(write_tar(tmp_path / "t.tar", [("a.png", image_bytes(0))]).read_bytes())
    data[124:136] = b"-0000001000\0"  # -512: a parser that believes it stands still
    with pytest.raises(tarfile.TarError):
        parse_sample(data)


@pytest.mark.parametrize("options", [("--format=gnu", "-S"), ("--format=posix", "-S"), ("--listed-incremental=snap",)])
def test_sparse_and_incremental_tars_of_gnu_tar(tmp_path, options):
    loose = tmp_path / "loose"
    loose.mkdir()
    for number in range(3):
        with (loose / f"{number}.png").open("wb") as file:
            file.write(image_bytes(number))
            file.truncate(200_000)  # a hole
        (loose / f"{number}.cls").write_text(str(number))
    words = ["tar", "--sort=name", *options, "-cf", tmp_path / "t.tar", "-C", loose, "."]
    subprocess.run(words, check=True, cwd=tmp_path)
    index = write_index(tmp_path / "t.tar")
    reader = ShardReader([index])
    for row, key in enumerate(index.table().keys):
        found, members = reader.read(0, row)
        assert found == key and bytes(members["png"]) == (loose / f"{Path(key).name}.png").read_bytes()


@given(
    st.lists(st.tuples(st.text("ab/ü.é", min_size=1, max_size=120), st.binary(max_size=1500)), min_size=1, max_size=6)
)
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_parsed_as_tarfile_does(format, files):
    buffer, wanted = io.BytesIO(), {}
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name, data in files:
            member = tarfile.TarInfo(f"{name.strip('/')}x.bin")
            member.size = len(data)
            with suppress(ValueError):  # ustar: too long a name
                archive.addfile(member, io.BytesIO(data))
    with tarfile.open(fileobj=io.BytesIO(buffer.getvalue())) as archive:
        for member in archive:
            if parts := split_member(member.name):
                wanted[parts[1]] = (parts[0], archive.extractfile(member).read())
        end = archive.offset
    key, members = parse_sample(buffer.getvalue()[:end])
    assert {extension: bytes(data) for extension, data in members.items()} == {e: d for e, (_, d) in wanted.items()}
    assert not wanted or key in {key for key, _ in wanted.values()}


def test_an_index_that_cannot_be_written_says_where_to_put_it(tmp_path):
    tar = write_tar(tmp_path / "t.tar", [("a.png", image_bytes(0))])
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written .* choose a folder by --index-dir"):
        write_index(tar, tmp_path / "file" / "folder")


def test_names_that_are_no_utf8(tmp_path):
    """Any bytes of file names pass through the index, a subset and the random stream of an evaluation."""
    folder = Path(os.fsdecode(bytes(tmp_path) + b"/f\xff"))
    name = os.fsdecode(b"k\xe9.png")
    write_tar(folder / "t.tar", [(name, image_bytes(0)), ("b.png", image_bytes(1))])
    index_all([str(folder)], str(tmp_path / "idx"), workers=1)
    shards = open_shards(str(folder), str(tmp_path / "idx"))
    assert shards[0].table().keys[0] == name[:-4]
    rows, unique = choose(shards, Fraction(1), 0, False, 1)
    write_list(tmp_path / "all.txt", shards, rows, unique)
    assert [len(part) for part in find(shards, read_list(tmp_path / "all.txt"))] == [2]
    assert fingerprint(shards) and stream_key("evaluation", name)
