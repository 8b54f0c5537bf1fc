"""Labels of foreign tars: from which member, field, folder or table; names and their numbers; the image of a sample."""

import json
from pathlib import Path

import pytest

from dsmim.data.reader import ShardReader
from dsmim.packing.verify import verify_shard
from dsmim.shards.index import read_index
from dsmim.shards.opening import index_all, open_shards
from dsmim.shards.sample_format import SampleFormat, checked_spec
from tests.conftest import dsmim, image_bytes, write_tar


def tars(folder: Path, parts: list[list[str]], extension: str = "json") -> Path:
    """One tar per part, with an image and KEY.EXTENSION per text; keys s0, s1, … run through all of them."""
    number = 0
    for shard, texts in enumerate(parts):
        members = []
        for text in texts:
            members += [(f"s{number}.png", image_bytes(number)), (f"s{number}.{extension}", text.encode())]
            number += 1
        write_tar(folder / f"t-{shard}.tar", members)
    return folder


def labels(folder: Path, index_dir=None) -> list[int]:
    return [label for shard in open_shards(str(folder), index_dir) for label in shard.table().labels.tolist()]


def index(folder: Path, spec: str | None, index_dir=None, workers=1, **options):
    form = SampleFormat(spec and checked_spec(spec), **options)
    return index_all([str(folder)], index_dir, workers, form=form)


def test_numbers_in_a_field_of_a_json_member(tmp_path):
    texts = [json.dumps({"label": n % 3, "meta": {"id": f"{n}"}, "score": 0.5}) for n in range(5)]
    tars(tmp_path, [texts[:3], texts[3:]])
    done = index(tmp_path, "json:label")
    assert labels(tmp_path) == [0, 1, 2, 0, 1]
    assert done.remarks() == ["5 samples with a class number (0 to 2), 0 without"]
    index(tmp_path, "json:meta.id")
    assert labels(tmp_path) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"t-0\.tar: s0: the label '0\.5' is neither a number from 0 nor a name"):
        index(tmp_path, "json:score")
    with pytest.raises(ValueError, match=r"s0\.json: its field meta is .*, neither a number nor a name"):
        index(tmp_path, "json:meta")


def test_a_reader_trains_on_the_label_of_the_index(tmp_path):
    tars(tmp_path, [['{"y": 4}', '{"y": 2.0}', "{}"]])
    index(tmp_path, "json:y")
    reader = ShardReader(open_shards(str(tmp_path)))
    assert [reader.label(0, row) for row in range(3)] == [4, 2, -1]
    assert verify_shard(str(tmp_path / "t-0.tar")).problems == [
        f"{tmp_path}/t-0.tar: 1 of 3 samples have no class number (KEY.cls), the first s2"
    ]


def test_names_are_numbered_in_sorted_order_over_all_shards(tmp_path):
    tars(tmp_path / "in", [["dog", "ant"], ["cat", "dog\n"]], "cls")
    for folder, workers in ((None, 1), (str(tmp_path / "i"), 2)):
        done = index(tmp_path / "in", "cls", folder, workers)
        assert labels(tmp_path / "in", folder) == [2, 0, 1, 2] and done.classes == ("ant", "cat", "dog")
        assert json.loads((Path(folder or tmp_path / "in") / "classes.json").read_text()) == ["ant", "cat", "dog"]
    assert index(tmp_path / "in", "cls").found.words == set()  # valid: no tar is read again


def test_shards_that_come_later_keep_the_numbers(tmp_path):
    tars(tmp_path, [["dog", "ant"], ["cat"]], "cls")
    index(tmp_path, "cls")
    write_tar(tmp_path / "t-9.tar", [("x.png", image_bytes(0)), ("x.cls", b"cat")])
    index(tmp_path, "cls")
    assert labels(tmp_path) == [2, 0, 1, 1]
    write_tar(tmp_path / "t-8.tar", [("y.png", image_bytes(0)), ("y.cls", b"cow")])
    with pytest.raises(ValueError, match=r"classes\.json: does not list 1 of the classes, such as 'cow'; remove it"):
        index(tmp_path, "cls")


def test_names_are_numbered_by_a_given_list(tmp_path):
    tars(tmp_path, [["dog", "ant", "1"]], "cls")
    (tmp_path / "names.txt").write_text("dog\nant\n")
    dsmim("shards", "index", tmp_path, "--classes", tmp_path / "names.txt")
    assert labels(tmp_path) == [0, 1, 1] and not (tmp_path / "classes.json").exists()
    (tmp_path / "names.json").write_text('{"ant": 0, "dog": 1, "fox": 2}')
    said = dsmim("shards", "index", tmp_path, "--classes", tmp_path / "names.json").stdout
    assert labels(tmp_path) == [1, 0, 1] and "3 samples with a class number (0 to 1), 0 without; 3 class names" in said
    (tmp_path / "names.txt").write_text("ant\nfox\n")
    done = dsmim("shards", "index", tmp_path, "--classes", tmp_path / "names.txt", check=False)
    assert "s0: the class 'dog' is not among the 2 of --classes" in done.stderr


def test_names_and_numbers_together_are_an_error(tmp_path):
    tars(tmp_path, [["dog", "1"], ["2"]], "cls")
    with pytest.raises(ValueError, match="2 labels are numbers and others are names, such as 'dog'"):
        index(tmp_path, "cls")


def test_the_default_counts_labels_that_are_no_numbers(tmp_path):
    tars(tmp_path, [["dog", " 1\r\n", "2.0"]], "cls")
    said = dsmim("shards", "index", tmp_path).stdout
    assert labels(tmp_path) == [-1, 1, 2]
    assert "labels that are no class number: .cls 1 (s0.cls: 'dog'); names are numbered by --labels cls" in said


def test_the_folder_in_the_key(tmp_path):
    names = ["./train/n02/a.png", "./train/n02/b.png", "./train/n01/c.png"]
    write_tar(tmp_path / "t-0.tar", [(name, image_bytes(n)) for n, name in enumerate(names)])
    said = dsmim("shards", "index", tmp_path, "--labels", "folder").stdout
    assert labels(tmp_path) == [1, 1, 0] and json.loads((tmp_path / "classes.json").read_text()) == ["n01", "n02"]
    assert "2 class names, in classes.json" in said


@pytest.mark.parametrize("heading", ["", "path,label\n"])
def test_a_table_beside_the_tars(tmp_path, heading):
    tars(tmp_path, [["{}", "{}"], ["{}"]])
    table = tmp_path / "labels.csv"
    table.write_text(f"{heading}./s0,7\ns1.png,3\nelsewhere,1\n")
    said = dsmim("shards", "index", tmp_path, "--labels", table).stdout
    assert labels(tmp_path) == [7, 3, -1] and "2 samples with a class number (0 to 7), 1 without" in said
    table.write_text("s0,1\ns1,1\ns2,0\n")
    dsmim("shards", "index", tmp_path, "--labels", table)
    assert labels(tmp_path) == [1, 1, 0]  # a table that has changed is read again
    table.write_text("s0,1\n./s0,2\n")
    done = dsmim("shards", "index", tmp_path, "--labels", table, check=False)
    assert "s0 has the labels '1' and '2'" in done.stderr


def test_the_choice_is_kept_until_another_is_given(tmp_path):
    tars(tmp_path, [['{"label": 5}']])
    index(tmp_path, "json:label")
    dsmim("shards", "index", tmp_path, "--force")
    assert labels(tmp_path) == [5]
    write_tar(tmp_path / "t-0.tar", [(n, d) for n, d in [("a.png", image_bytes(3)), ("a.json", b'{"label": 6}')]])
    dsmim("shards", "index", tmp_path)
    assert labels(tmp_path) == [6]
    dsmim("shards", "index", tmp_path, "--labels", "cls")
    assert labels(tmp_path) == [-1]


def test_labels_that_no_sample_has_are_a_warning(tmp_path):
    tars(tmp_path, [["{}", "{}"]])
    (tmp_path / "labels.csv").write_text("x0,1\n")
    said = dsmim("shards", "index", tmp_path, "--labels", tmp_path / "labels.csv").stdout
    assert "warning: none of the 2 samples, such as s0, has a label by --labels" in said


def test_wrong_specifications():
    for spec in ("a/b", "json:", "xml:label", "two words"):
        with pytest.raises(ValueError, match=r"give cls \(or another extension\), json:FIELD, folder"):
            checked_spec(spec)
    with pytest.raises(ValueError, match="cannot be read"):
        checked_spec("nowhere.csv")


def test_the_image_of_a_sample_that_has_several(tmp_path):
    members = [
        (f"s{n}.{e}", image_bytes(10 * n + k)) for n in range(2) for k, e in enumerate(("png", "jpg", "main.jpg"))
    ]
    write_tar(tmp_path / "t.tar", members)
    said = dsmim("shards", "index", tmp_path / "t.tar").stdout
    assert "of which one is taken: jpg of jpg and png 2 (s0); choose another by --image-key" in said
    (shard,) = open_shards(str(tmp_path / "t.tar"))
    for key, there in ((None, "jpg"), ("png", "png"), ("main.jpg", "main.jpg"), ("gif", None)):
        reader = ShardReader([shard], image_key=key)
        assert reader.image_of(0, reader.read(0, 0)[1]) == there
    dsmim("shards", "index", tmp_path / "t.tar", "--image-key", ".main.jpg")
    reader = ShardReader([read_index(tmp_path / "t.tar")])
    assert reader.image_of(0, reader.read(0, 1)[1]) == "main.jpg"


def test_an_image_key_makes_samples_of_what_was_left_out(tmp_path):
    write_tar(tmp_path / "t.tar", [(f"s{n}.input.jpg", image_bytes(n)) for n in range(3)])
    said = dsmim("shards", "index", tmp_path / "t.tar", "--image-key", "input.jpg").stdout
    assert "1 shards, 3 samples" in said and "left out" not in said
    assert verify_shard(str(tmp_path / "t.tar"), decode_images=False) == ([], {})


def test_a_build_keeps_the_labels_of_the_index(tmp_path):
    tars(tmp_path / "in", [['{"y": 4}', '{"y": 2}', "{}"]])
    index(tmp_path / "in", "json:y")
    dsmim("shards", "build", tmp_path / "in", tmp_path / "out")
    (shard,) = open_shards(str(tmp_path / "out"))
    table = shard.table()
    assert dict(zip(table.keys, table.labels.tolist(), strict=True)) == {"s0": 4, "s1": 2, "s2": -1}
