"""What is said about samples before the first step: labels, classes in use, shards in both sets."""

import shutil
from pathlib import Path

import pytest
import yaml

from dsmim.data.checks import check_data, data_problems
from dsmim.data.from_recipe import open_reader, training_shards, validation_shards
from dsmim.preflight import check_training
from dsmim.recipe.reading import parse_recipe
from dsmim.shards.index import fingerprint, write_index
from dsmim.shards.opening import open_shards
from tests.conftest import dsmim, image_bytes, make_shards, tiny_recipe, write_tar


def labelled(tar: Path, labels: list[int | str | None], first: int = 0) -> Path:
    members = []
    for number, label in enumerate(labels, first):
        members += [(f"s{number:03d}.png", image_bytes(number))]
        members += [] if label is None else [(f"s{number:03d}.cls", str(label).encode())]
    write_index(write_tar(tar, members))
    return tar


def recipe(folder: Path, num_classes: int = 3, val: str | None = "val-*.tar", **data):
    tree = tiny_recipe(folder, task={"name": "classify", "num_classes": num_classes})
    tree["data"] |= {"val": val and f"{folder}/{val}", **data}
    return tree


def parsed(*arguments, **data):
    return parse_recipe(recipe(*arguments, **data), "test")


def problems(settings) -> list[str]:
    validation = None if settings.data.val is None else validation_shards(settings.data)
    return data_problems(settings, training_shards(settings.data), validation)


def test_labels_outside_the_classes_are_counted(tmp_path):
    labelled(tmp_path / "train-0.tar", [0, 1, 2, 0])
    labelled(tmp_path / "train-1.tar", [3, 2, 5, 3], first=4)
    labelled(tmp_path / "val-0.tar", [1, 9], first=8)
    assert problems(parsed(tmp_path)) == [
        f"data.train: 3 of 8 samples have class numbers that task.num_classes 3 does not allow (0 to 2): 3, 5, such as "
        f"s004 in {tmp_path}/train-1.tar, s007 in {tmp_path}/train-1.tar; set task.num_classes=6, or list the classes "
        "in use in data.classes, which numbers them from 0",
        f"data.val: 1 of 2 samples have class numbers that task.num_classes 3 does not allow (0 to 2): 9, such as s009 "
        f"in {tmp_path}/val-0.tar; set task.num_classes=10, or list the classes in use in data.classes, which numbers "
        "them from 0",
    ]
    assert problems(parsed(tmp_path, 10)) == []


def test_samples_without_a_class_number_are_counted(tmp_path):
    labelled(tmp_path / "train-0.tar", [0, None, 1, "cat", None, None])
    (line,) = problems(parsed(tmp_path, val=None))
    assert line.startswith(
        f"data.train: 4 of 6 samples have no class number, such as s001 in {tmp_path}/train-0.tar, s003 in "
        f"{tmp_path}/train-0.tar, s004 in {tmp_path}/train-0.tar; "
    )
    labelled(tmp_path / "train-0.tar", ["cat", None])
    assert "such as s000 in" in (line := problems(parsed(tmp_path, val=None))[0]) and "(s000.cls is 'cat')" in line


def test_a_task_without_labels_has_no_problem_with_them(tmp_path):
    labelled(tmp_path / "train-0.tar", [None, 7])
    tree = recipe(tmp_path, val=None) | {"task": {"name": "simmim", "mask_patch": 16}}
    assert problems(parse_recipe(tree, "test")) == []


def test_a_subset_is_checked_without_the_samples_that_it_leaves_out(tmp_path):
    tar = labelled(tmp_path / "train-0.tar", [0, None, 2, 7])
    (tmp_path / "list.txt").write_text("s000\ns002\n")
    dsmim("shards", "subset", tar, tmp_path / "list.txt")
    assert problems(parsed(tmp_path, val=None, subset=str(tmp_path / "list.txt"))) == []


def test_training_stops_at_its_start_and_submit_finds_it_before(tmp_path):
    labelled(tmp_path / "train-0.tar", [0, 1, 2, None] * 4)
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(recipe(tmp_path, val=None)))
    done = dsmim("train", file, "--run-dir", tmp_path / "run", check=False)
    assert done.returncode == 1 and "4 of 16 samples have no class number, such as s003" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run/metrics.jsonl").exists()
    found = check_training(parsed(tmp_path, val=None), 1, tmp_path / "run", fork=False)
    assert any("4 of 16 samples have no class number" in line for line in found)


def test_shards_in_both_sets_are_an_error_under_any_path(tmp_path):
    make_shards(tmp_path, [3, 3])
    make_shards(tmp_path, [4], name="val")
    (line,) = problems(parsed(tmp_path, train=str(tmp_path)))
    assert f"share 1 shards, such as {tmp_path}/val-000.tar: " in line and "data.train='FOLDER/train-*.tar'" in line
    shutil.copy(tmp_path / "val-000.tar", tmp_path / "train-009.tar")
    write_index(tmp_path / "train-009.tar")
    assert (
        f"{tmp_path}/train-009.tar and {tmp_path}/val-000.tar, which have the same contents"
        in problems(parsed(tmp_path))[0]
    )
    (tmp_path / "train-009.tar").unlink()
    (tmp_path / "train-009.tar").symlink_to("val-000.tar")
    write_index(tmp_path / "train-009.tar")
    assert "share 1 shards" in problems(parsed(tmp_path))[0]
    (tmp_path / "train-009.tar").unlink()
    assert problems(parsed(tmp_path)) == []


def test_the_same_shards_for_both_sets_are_only_noted(tmp_path):
    make_shards(tmp_path, [3])
    settings = parsed(tmp_path, val="train-*.tar")
    shards = training_shards(settings.data)
    assert check_data(settings, shards, shards) == [
        "data.val names the shards of data.train: validation measures the samples that are trained on"
    ]


def test_classes_in_use_are_renumbered_and_others_are_not_in_the_epoch(tmp_path):
    labels = [i % 7 for i in range(28)]
    labelled(tmp_path / "train-0.tar", [*labels[:10], None])
    labelled(tmp_path / "train-1.tar", labels[10:], first=11)
    labelled(tmp_path / "val-0.tar", [5, 0, 2, 2], first=40)
    settings = parsed(tmp_path, 2, classes=[5, 2])
    shards = training_shards(settings.data)
    assert [shard.samples for shard in shards] == [3, 5] and problems(settings) == []
    assert all(shard.labels().tolist() == shard.table().labels.tolist() for shard in shards)
    reader = open_reader(settings.data, shards, 1)
    for shard, index in enumerate(shards):
        for row in range(index.samples):
            key, members = reader.read(shard, row)
            assert key == index.table().keys[row]
            assert (5, 2)[reader.label(shard, row)] == int(bytes(members["cls"]))
    assert validation_shards(settings.data)[0].table().labels.tolist() == [0, 1, 1]
    plain = open_shards(f"{tmp_path}/train-*.tar")
    others = training_shards(parsed(tmp_path, 2, classes=[2, 5]).data)
    assert len({fingerprint(these) for these in (plain, shards, others)}) == 3


def test_classes_of_a_subset(tmp_path):
    tar = labelled(tmp_path / "train-0.tar", [4, 2, 4, 2, 0])
    (tmp_path / "list.txt").write_text("s001\ns002\ns004\n")
    dsmim("shards", "subset", tar, tmp_path / "list.txt")
    data = parsed(tmp_path, 2, None, subset=str(tmp_path / "list.txt"), classes=[4, 2]).data
    (shard,) = training_shards(data)
    assert shard.table().keys == ["s001", "s002"] and shard.labels().tolist() == [1, 0]


def test_classes_by_name_and_from_a_file(tmp_path):
    labelled(tmp_path / "train-0.tar", [0, 1, 2, 1])
    (tmp_path / "classes.json").write_text('["ant", "bee", "cat"]')
    (tmp_path / "mine.txt").write_text("cat\n1\n")
    for classes in (["cat", "bee"], ["cat", 1], str(tmp_path / "mine.txt")):
        (shard,) = training_shards(parsed(tmp_path, 2, None, classes=classes).data)
        assert shard.labels().tolist() == [1, 0, 1]
    for classes, message in [
        (["cats"], r"'cats' is no class of classes\.json; did you mean cat\?"),
        ([1, "bee"], "each once"),
        ([1, 8], r"no sample of data\.train has the class 8"),
        (str(tmp_path / "none.txt"), r"none\.txt: cannot be read"),
    ]:
        with pytest.raises(ValueError, match=message):
            training_shards(parsed(tmp_path, 2, None, classes=classes).data)


def test_more_classes_than_the_data_has_is_a_warning_in_the_log(tmp_path):
    labelled(tmp_path / "train-0.tar", [0, 1] * 8)
    (tmp_path / "classes.json").write_text('["ant", "bee"]')
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe(tmp_path, 5, None)))
    done = dsmim("train", tmp_path / "r.yaml", "--run-dir", tmp_path / "run")
    said = f"warning: task.num_classes is 5, but {tmp_path}/classes.json lists 2 classes"
    assert said in done.stdout + done.stderr
    settings = parsed(tmp_path, 2, None)
    assert check_data(settings, training_shards(settings.data), None) == []


def test_paths_of_a_recipe_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tar = labelled(tmp_path / "in/train-0.tar", [0, 1, 2])
    write_index(tar, tmp_path / "index")
    Path(f"{tar}.dsmi").unlink()
    (tmp_path / "list.txt").write_text("s001\n")
    dsmim(
        "shards", "subset", "~/in/*.tar", tmp_path / "list.txt", "--index-dir", tmp_path / "index", HOME=str(tmp_path)
    )
    data = parsed(tmp_path, 3, None, train="~/in/*.tar", index_dir="~/index", subset="~/list.txt").data
    assert [shard.table().keys for shard in training_shards(data)] == [["s001"]]
