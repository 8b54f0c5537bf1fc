"""Sources of a build: tables, folders and tars, filtered and split."""

import pytest

from dsmim.packing.sources import filter_sources, read_sources, split_sources
from tests.conftest import dsmim, image_bytes, write_tar
from tests.packing.contents import samples_of


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


def test_a_table_from_a_spreadsheet(tmp_path):
    (tmp_path / "a,b.png").write_bytes(image_bytes(0))
    (tmp_path / "t.csv").write_bytes(b'\xef\xbb\xbfpath,label\r\n"a,b.png",3\r\n')
    sources, _ = read_sources(str(tmp_path / "t.csv"))
    assert [(source.key, source.label) for source in sources] == [("a,b", 3)]


def test_images_beside_class_folders_are_refused(folder):
    (folder / "stray.png").write_bytes(image_bytes(1))
    with pytest.raises(ValueError, match="beside class folders"):
        read_sources(str(folder))


def test_tars_without_an_index_and_remote_ones_are_refused(tmp_path):
    write_tar(tmp_path / "t.tar", [("a.png", image_bytes(0))])
    for source, message in [(f"{tmp_path}/t.tar", "has no index"), ("s3://b/{0..1}.tar", "built from local tars")]:
        with pytest.raises(ValueError, match=message):
            read_sources(source)


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
