"""Sources of a build: tables, folders and tars, filtered and split."""

import pytest

from dsmim.packing.sources import filter_sources, read_sources, split_sources
from tests.conftest import dsmim, image_bytes, write_tar
from tests.packing.contents import samples_of


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("path,label\nx.png,1\n", r"no such file in 1 of 1 rows: row 2 \(x\.png, 1\); .* see --root"),
        ("images/cat/1.png,1\nimages/cat/2.png\n", r"row 1 has 2 columns: .* row 2 \(images/cat/2\.png\)"),
        ("", "no images found: the table is empty"),
        ("images/cat/1.png,1\nimages/cat/2.png,\n", r"no label in 1 of 2 rows: row 2 \(images/cat/2\.png, \)"),
        (
            "images/cat/1.png,1\nimages/cat/2.png,-1\n",
            "row 2 has the label '-1', where the first one, '1', is a number",
        ),
        ("images/cat/1.png,tabby\nimages/cat/2.png,3\n", "row 2 has the label '3', where the first one, 'tabby', is a"),
        (
            "images/cat/1.png\nimages/cat/1.png\n",
            r"lists 1 images more than once: images/cat/1\.png in rows 1, 2; keep",
        ),
        (
            "images/cat/1.png,1e3\nimages/cat/2.png,2\n",
            "row 2 has the label '2', where the first one, '1e3', is a name",
        ),
        ("images/cat/1.png,1000000000\n", "above 999999999: 1000000000; number the classes from 0"),
        ("images/cat/1.png 1\n", r"row 1 has 1 columns: 'images/cat/1\.png 1'; write paths alone, or path,label"),
        (
            "id,target\nimages/cat/1.png,1\n",
            "row 1 has 2 columns: 'id', 'target'; call the columns to use path and label",
        ),
        (
            "path,label,class\nimages/cat/1.png,1,2\n",
            "'path', 'label', 'class'; call the columns to use path and label",
        ),
        ("images/cat/1.png,a,train\n", "3 columns: .*; add a first row that names the columns path and label"),
        ("path,label\nimages/cat/1,1\n", r"no image's extension .* 1 of 1 rows: row 2 .*; write it: 1\.png is there"),
    ],
)
def test_bad_tables(folder, tmp_path, rows, message):
    table = tmp_path / "t.csv"
    table.write_text(rows)
    with pytest.raises(ValueError, match=message):
        read_sources(str(table))


@pytest.mark.parametrize(
    "text",
    [
        "images/cat/1.png\t3\nimages/dog/2.png\t0\n",  # as Swin's train_map.txt
        "path;label\nimages/cat/1.png;3\nimages/dog/2.png;0\n",
        "File_Name,Class\nimages/cat/1.png,3\nimages/dog/2.png,0\n",
        "IMAGE,species\nimages/cat/1.png,3\nimages/dog/2.png,0\n",
        "label\tpath\n3\timages/cat/1.png\n0\timages/dog/2.png\n",
        "3,images/cat/1.png\n0,images/dog/2.png\n",
        ",path,label\n0,images/cat/1.png,3\n1,images/dog/2.png,0\n",  # pandas writes its index too
        "\n\npath,label\n\nimages/cat/1.png,03\nimages/dog/2.png,00\n",
    ],
)
def test_separators_and_headings_that_leave_no_doubt(folder, tmp_path, text):
    (tmp_path / "t.txt").write_text(text)
    found = read_sources(str(tmp_path / "t.txt"))
    assert [(source.key, source.label) for source in found.sources] == [("images/cat/1", 3), ("images/dog/2", 0)]
    assert found.warnings == ([f"{tmp_path}/t.txt: these columns are not used: ''"] if text[0] == "," else [])


def test_separators_within_names_of_files(tmp_path):
    for name in ("a,b.png", "c;d.png"):
        (tmp_path / name).write_bytes(image_bytes(0))
    (tmp_path / "t.txt").write_text("a,b.png\t3\n")
    assert read_sources(str(tmp_path / "t.txt")).sources[0].label == 3
    (tmp_path / "t.txt").write_text("path;label\na,b.png;3\n")
    assert read_sources(str(tmp_path / "t.txt")).sources[0].key == "a,b"
    (tmp_path / "t.csv").write_text('"a,b.png",3\nc;d.png,4\n')
    assert [source.label for source in read_sources(str(tmp_path / "t.csv")).sources] == [3, 4]


def test_an_empty_column_of_labels_means_none_and_is_said(folder, tmp_path):
    (tmp_path / "t.csv").write_text("path,label\nimages/cat/1.png,\nimages/dog/2.png,\n")
    found = read_sources(str(tmp_path / "t.csv"))
    assert [source.label for source in found.sources] == [None, None] and "is empty" in found.warnings[0]


def test_all_faulty_rows_are_listed_at_once(folder, tmp_path):
    rows = [f"images/cat/{i % 5}.png,0" for i in range(10)] + [f"images/dog/{i % 5}.png,1" for i in range(15)]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    with pytest.raises(ValueError, match="lists 10 images more than once") as caught:
        read_sources(str(tmp_path / "t.csv"))
    assert "images/cat/4.png in rows 5, 10, " in str(caught.value) and "images/dog/0.png in rows 11, 16, 21" in str(
        caught.value
    )
    (tmp_path / "t.csv").write_text("\n".join(f"none{i}.png,0" for i in range(14)))
    with pytest.raises(
        ValueError, match=r"no such file in 14 of 14 rows: row 1 .*, row 10 \(none9.png, 0\) and 4 more"
    ):
        read_sources(str(tmp_path / "t.csv"))


def test_all_keys_that_images_share_are_listed_at_once(folder):
    for i in range(3):
        (folder / "cat" / f"{i}.jpg").write_bytes(image_bytes(i, kind="JPEG"))
    (folder / "dog" / "a.1.png").write_bytes(image_bytes(1))
    (folder / "dog" / "a_1.png").write_bytes(image_bytes(2))
    with pytest.raises(ValueError, match="4 keys would be shared by several images: ") as caught:
        read_sources(str(folder))
    assert f"'cat/0' ({folder}/cat/0.jpg, {folder}/cat/0.png), 'cat/1' (" in str(caught.value)
    assert f"'dog/a_1' ({folder}/dog/a.1.png, {folder}/dog/a_1.png)" in str(caught.value)


def test_the_home_folder_in_every_path(folder, tmp_path):
    (tmp_path / "t.csv").write_text("~/images/cat/1.png,3\n")
    words = ["~/t.csv", "~/out", "--root=~/images", "--keys=~/keys.txt"]
    key = f"{tmp_path}/images/cat/1".lstrip("/")
    (tmp_path / "keys.txt").write_text(f"{key}\n")
    dsmim("shards", "build", *words, HOME=str(tmp_path))
    assert set(samples_of(tmp_path / "out")) == {key}
    assert "10 images" in dsmim("shards", "build", "~/images", "~/out2", HOME=str(tmp_path)).stdout


def test_a_source_that_does_not_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source in ("nowhere", "nowhere/*.jpg"):
        with pytest.raises(ValueError, match=r"no such file or folder \(looked in /.*\); give a folder of images or"):
            read_sources(source)


def test_a_table_from_a_spreadsheet(tmp_path):
    (tmp_path / "a,b.png").write_bytes(image_bytes(0))
    (tmp_path / "t.csv").write_bytes(b'\xef\xbb\xbfpath,label\r\n"a,b.png",3\r\n')
    found = read_sources(str(tmp_path / "t.csv"))
    assert [(source.key, source.label) for source in found.sources] == [("a,b", 3)]


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
