"""Which numbers the classes of a build get, and what is said about them."""

import json
from collections import Counter

import pytest
from timm.data import create_dataset
from torchvision.datasets import ImageFolder

from dsmim.packing.classes import class_lines
from dsmim.packing.sources import read_sources
from tests.conftest import dsmim, image_bytes
from tests.packing.contents import samples_of


def class_folders(root, *names, images=1):
    for place, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(images):
            (root / name / f"{i}.png").write_bytes(image_bytes(10 * place + i))
    return root


def labels_of(source, **options) -> dict[str, int]:
    """Folder's name → class number."""
    return {source.key.partition("/")[0]: source.label for source in read_sources(str(source), **options).sources}


@pytest.fixture
def numbered(tmp_path):
    return class_folders(tmp_path / "v2", *map(str, range(12)))


def test_folders_named_by_numbers_are_an_error_that_shows_every_way(numbered, tmp_path):
    done = dsmim("shards", "build", numbered, tmp_path / "out", check=False)
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    assert "classes are named by numbers; choose their class numbers by --numeric-classes:" in done.stderr
    assert "number: 0 → 0, 1 → 1, 2 → 2, …, 9 → 9, 10 → 10, 11 → 11 (the name is the class number)" in done.stderr
    assert "text: 0 → 0, 1 → 1, 2 → 4, …, 9 → 11, 10 → 2, 11 → 3 (sorted as text, as torchvision does)" in done.stderr


def test_the_ways_to_number_are_those_of_timm_and_torchvision(numbered, tmp_path):
    assert labels_of(numbered, numeric="order") == create_dataset("", str(numbered)).reader.class_to_idx
    assert labels_of(numbered, numeric="text") == ImageFolder(numbered).class_to_idx
    some = class_folders(tmp_path / "some", "3", "20", "100")
    assert labels_of(some, numeric="number") == {"3": 3, "20": 20, "100": 100}
    assert labels_of(some, numeric="order") == create_dataset("", str(some)).reader.class_to_idx
    assert labels_of(some, numeric="text") == ImageFolder(some).class_to_idx


def test_a_chosen_way_is_what_the_shards_hold(numbered, tmp_path):
    dsmim("shards", "build", numbered, tmp_path / "out", "--numeric-classes", "number")
    assert {key: int(members["cls"]) for key, members in samples_of(tmp_path / "out").items()} == {
        f"{i}/0": i for i in range(12)
    }
    assert json.loads((tmp_path / "out/classes.json").read_text()) == [str(i) for i in range(12)]


@pytest.mark.parametrize("names", [map(str, range(10)), [f"{i:03d}" for i in range(11)]])
def test_numbers_that_every_way_numbers_alike_need_no_choice(tmp_path, names):
    names = list(names)
    assert labels_of(class_folders(tmp_path / "v", *names)) == {name: int(name) for name in names}


@pytest.mark.parametrize(
    ("names", "numeric", "message"),
    [
        (["1", "2"], None, r"number: 1 → 1, 2 → 2 .*\n.*order: 1 → 0, 2 → 1"),
        (["7", "07"], "number", "several names for one number: 07, 7; choose order or text"),
        (["20240101", "20240102"], "number", "too large: 20240101, 20240102; choose order or text"),
        (["7", "8", "cat"], "order", "--numeric-classes: classes of .* are no numbers: cat"),
    ],
)
def test_numbers_that_cannot_be_meant(tmp_path, names, numeric, message):
    with pytest.raises(ValueError, match=message):
        labels_of(class_folders(tmp_path / "v", *names), numeric=numeric)


def test_labels_of_tables_that_are_floats(numbered, tmp_path):
    table, words = tmp_path / "t.csv", ["0.0", "1.0", "2.0", "10.0", "11.0"]
    table.write_text("path,label\n" + "".join(f"v2/{i}/0.png,{word}\n" for i, word in enumerate(words)))
    with pytest.raises(ValueError, match=r"named by numbers; .*\n  number: .*10\.0 → 10.*\n.*\n  text: .*10\.0 → 2"):
        read_sources(str(table))
    for numeric, labels in [("number", [0, 1, 2, 10, 11]), ("order", [0, 1, 2, 3, 4]), ("text", [0, 1, 4, 2, 3])]:
        found = read_sources(str(table), numeric=numeric)
        assert [source.label for source in found.sources] == labels
        assert found.classes == {"number": [], "order": words, "text": sorted(words)}[numeric]
    table.write_text("path,label\nv2/0/0.png,0.5\nv2/1/0.png,1.0\n")
    with pytest.raises(ValueError, match=r"number: not possible \(not whole, or too large: 0\.5\)"):
        read_sources(str(table))
    with pytest.raises(ValueError, match=r"not whole, or above 999999999: 0\.5"):
        read_sources(str(table), numeric="number")


def test_an_empty_folder_keeps_its_number_and_is_named(tmp_path):
    class_folders(tmp_path / "val", "ant", "cat", images=2)
    (tmp_path / "val/bee").mkdir()
    done = dsmim("shards", "build", tmp_path / "val", tmp_path / "out")
    assert "3 classes:\n  0 ant: 2 images\n  1 bee: 0 images\n  2 cat: 2 images\n" in done.stdout
    assert "1 class numbers have no images: 1 bee\n" in done.stdout
    assert samples_of(tmp_path / "out")["cat/0"]["cls"] == b"2"


def test_a_missing_class_folder_is_an_error_whose_fix_is_right(tmp_path):
    class_folders(tmp_path / "train", "ant", "bee", "cat")
    class_folders(tmp_path / "val", "ant", "cat")
    dsmim("shards", "build", tmp_path / "train", tmp_path / "out", "--name", "train")
    done = dsmim("shards", "build", tmp_path / "val", tmp_path / "out", "--name", "val", check=False)
    fix = f"--classes {tmp_path}/out/classes.json"
    assert (
        done.returncode == 1 and f"lists 1 more classes (bee); to number these images by it, add: {fix}" in done.stderr
    )
    for out in ("out", "elsewhere"):
        dsmim("shards", "build", tmp_path / "val", tmp_path / out, "--name", "val", *fix.split())
        assert {key: members["cls"] for key, members in samples_of(tmp_path / out / "val-*.tar").items()} == {
            "ant/0": b"0",
            "cat/0": b"2",
        }
    assert json.loads((tmp_path / "elsewhere/classes.json").read_text()) == ["ant", "bee", "cat"]


def test_given_lists_of_classes(tmp_path):
    folder, given = class_folders(tmp_path / "v", "2", "10", "dog"), tmp_path / "names.txt"
    given.write_text("dog\n10\n2\nemu\n")
    assert labels_of(folder, known=given) == {"dog": 0, "10": 1, "2": 2}
    (tmp_path / "t.csv").write_text("v/2/0.png,10\nv/dog/0.png,dog\n")
    assert [source.label for source in read_sources(str(tmp_path / "t.csv"), known=given).sources] == [1, 0]
    given.write_text("dog\n10\n")
    with pytest.raises(ValueError, match=r"1 of its classes are not in .*names\.txt: 2; leave them out, or add them"):
        labels_of(folder, known=given)
    with pytest.raises(ValueError, match="--numeric-classes has no effect with --classes"):
        labels_of(folder, known=given, numeric="text")


def test_options_of_classes_are_refused_where_there_are_none(tmp_path):
    class_folders(tmp_path, "flat")
    for options in ({"known": tmp_path / "names.txt"}, {"numeric": "text"}):
        with pytest.raises(ValueError, match="flat has neither class folders nor labels"):
            read_sources(str(tmp_path / "flat"), **options)


def test_options_of_classes_are_refused_for_tars(tars, tmp_path):
    for options in ({"known": tmp_path / "names.txt"}, {"numeric": "text"}):
        with pytest.raises(ValueError, match="no effect on tars, whose samples keep their labels"):
            read_sources(str(tars), **options)
    assert "2 classes:\n  0: 5 images\n  1: 4 images\n" in dsmim("shards", "build", tars, tmp_path / "out").stdout


def test_what_is_printed_stays_short():
    classes = [f"c{i}" for i in range(5000)]
    lines = class_lines(classes, {"data": Counter(dict.fromkeys(range(0, 5000, 2), 7))})
    assert len(lines) < 25 and lines[:3] == ["5000 classes:", "  0 c0: 7 images", "  1 c1: 0 images"]
    assert lines[11] == "  …" and lines[-2:] == [
        "  4999 c4999: 0 images",
        f"  2500 class numbers have no images: {', '.join(f'{i} c{i}' for i in range(1, 21, 2))} and 2490 more",
    ]
    parts = {"train": Counter({1: 3, 999_999_999: 1}), "val": Counter({1: 1})}
    assert class_lines([], parts) == [
        "2 classes:",
        "  1: train 3, val 1",
        "  999999999: train 1, val 0",
        "  999999998 class numbers have no images: 0, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 999999988 more",
    ]
    assert class_lines([], {"data": Counter()}) == []


def test_splits_that_were_taken_for_classes(tmp_path):
    for split in ("train", "val"):
        class_folders(tmp_path / "set" / split, "cat", "dog")
    done = dsmim("shards", "build", tmp_path / "set", tmp_path / "out")
    lines = done.stderr.splitlines()
    assert lines[0].startswith("warning: train, val: as classes, these names look like splits of a data set")
    for line in lines[1:]:  # the commands that it gives
        dsmim(*line.strip().replace("OUT", str(tmp_path / "right")).split()[1:])
    for split in ("train", "val"):
        found = samples_of(tmp_path / "right" / f"{split}-*.tar")
        assert {key: members["cls"] for key, members in found.items()} == {"cat/0": b"0", "dog/0": b"1"}


@pytest.mark.parametrize(
    ("folders", "warning"),
    [
        (["train/a"], "train: as a class, this name looks like"),
        (["Test/a", "valid/a", "other/a"], "Test, valid: as classes, these names look like"),
        (
            ["animals/cat", "animals/dog"],
            r"all images are in one class, 'animals', which holds the folders cat, dog; .* from",
        ),
        (["train", "car", "bus"], None),
        (["animals/cat", "plants/fern"], None),
    ],
)
def test_names_that_look_like_classes_or_not(tmp_path, folders, warning):
    import re

    found = read_sources(str(class_folders(tmp_path / "set", *folders))).warnings
    assert (re.search(warning, *found) and len(found) == 1) if warning else not found
