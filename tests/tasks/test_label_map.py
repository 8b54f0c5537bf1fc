"""Other right answers than a data set's own labels, against timm's lists and a computation by hand."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from timm.data import ImageNetInfo, RealLabelsImagenet
from torch.nn import functional as F

from dsmim.recipe.reading import parse_recipe
from dsmim.tasks.classify import Classify
from dsmim.tasks.label_map import LabelMap, read_label_map, timm_list
from dsmim.tasks.per_class import Confusion
from dsmim.tasks.real_labels import RealLabels, name_of, read_right_labels
from tests.conftest import tiny_recipe


def recipe_of(folder, classes: int):
    model = {"name": "swinv2_nano", "img_size": 32, "window_size": 4}
    return parse_recipe(tiny_recipe(folder, task={"name": "classify", "num_classes": classes}, model=model), "test")


def shard(folder, labels: list[int], keys: list[str] = (), classes: tuple[int, ...] = ()):
    """What the checks see of an index."""
    return SimpleNamespace(
        labels=lambda: np.array(labels, np.int32), table=lambda: SimpleNamespace(keys=list(keys)), classes=classes,
        file=str(folder / "val.tar.dsmi"), tar=str(folder / "val.tar"),
    )  # fmt: skip


def measure(task, logits: torch.Tensor, labels: list[int], keys: list[str] = (), weight: list[float] | None = None):
    """The task's metrics for a network that gives these logits, in two batches."""
    task.normalise = lambda images: images
    weight = torch.tensor(weight or [1.0] * len(logits))
    total = 0
    for part in torch.arange(len(logits)).split(len(logits) // 2 + 1):
        batch = {"image": logits[part], "label": torch.tensor(labels or [0] * len(logits))[part],
                 "weight": weight[part], "key": [keys[n] for n in part] if keys else []}  # fmt: skip
        total = total + task.validation_sums(lambda images: images, batch)
    return task.metrics(total)


@pytest.mark.parametrize("name", ["imagenet-a", "imagenet-r"])
def test_the_named_maps_are_the_rows_of_the_sets_classes(name):
    rows = read_label_map(name, 1000).rows
    ours = ImageNetInfo("imagenet-1k").label_names()
    folders = [ours[row] for row in rows]
    assert len(set(folders)) == 200 and folders == sorted(folders)  # labels are numbers of sorted folders
    assert folders == timm_list(f"{name.replace('-', '_')}_synsets.txt").split()


def test_scores_compete_within_the_subset_alone(tmp_path):
    torch.manual_seed(0)
    task = Classify(recipe_of(tmp_path, 1000))
    task.use_label_map(read_label_map("imagenet-r", 1000))
    assert task.classes == 200
    logits, labels = 3 * torch.randn(300, 1000), torch.randint(200, (300,))
    rows = torch.tensor(task.label_map.rows)
    logits[torch.arange(200), rows[labels[:200]]] += 6
    logits[:150, 5] = 100  # a class that ImageNet-R does not have
    assert 5 not in rows
    found = measure(task, logits, labels.tolist())
    within = logits[:, rows]  # hendrycks/imagenet-r, eval.py
    assert found["accuracy"] == pytest.approx((within.argmax(1) == labels).float().mean().item())
    top5 = (within.topk(5).indices == labels[:, None]).any(1).float().mean().item()
    assert found["accuracy_top5"] == pytest.approx(top5) and 0 < found["accuracy"] < top5 < 1
    assert found["loss"] == pytest.approx(F.cross_entropy(within, labels).item(), rel=1e-5)
    assert found["samples"] == 300


def test_labels_that_mean_one_class_or_none(tmp_path):
    """Two labels of one class, one that is left out; the confusion matrix has the classes that compete."""
    (tmp_path / "map.txt").write_text("3\n-1\n3\n1\n")
    task = Confusion(recipe_of(tmp_path, 5))
    task.use_label_map(read_label_map(str(tmp_path / "map.txt"), 5))
    logits = torch.eye(5)[[3, 3, 1, 1, 0, 0]] * 4
    found = measure(task, logits, [0, 1, 2, 3, 3, 0], weight=[1, 1, 1, 1, 1, 0])
    assert found["samples"] == 4 and found["accuracy"] == 0.75 and np.isfinite(found["loss"])
    assert [(row["class"], row["samples"], row["accuracy"]) for row in found["classes"]] == [(1, 2, 1.0), (3, 2, 0.5)]
    assert found["confusion"] == [[2, 0], [1, 1]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0\n5\n", r"map\.txt: 5 is no row of a classifier of 5 classes; give 0 to 4 for each label, or -1"),
        ("0\nx\n", r"map\.txt: 'x' is no row"),
        ("-2", r"map\.txt: -2 is no row"),
        ("", r"map\.txt: an empty file is no row"),
    ],
)
def test_a_wrong_map_is_an_error(tmp_path, text, message):
    (tmp_path / "map.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_label_map(str(tmp_path / "map.txt"), 5)


def test_other_wrong_maps(tmp_path):
    (tmp_path / "map.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"map\.json: should be a JSON list of row numbers"):
        read_label_map(str(tmp_path / "map.json"), 5)
    with pytest.raises(ValueError, match="--label-map imagenet-b: must be imagenet-a, imagenet-r, or a file"):
        read_label_map("imagenet-b", 1000)
    with pytest.raises(ValueError, match="means rows of ImageNet-1K's 1000 classes, the model has 10"):
        read_label_map("imagenet-a", 10)


def test_a_map_for_other_labels_is_an_error(tmp_path):
    chosen = LabelMap("map.txt", (4, 2, -1))
    chosen.check([shard(tmp_path, [0, 1]), shard(tmp_path, [2])])
    with pytest.raises(ValueError, match=r"map\.txt: has rows for 3 labels, but data\.val has the label 3; give a row"):
        chosen.check([shard(tmp_path, [0, 3])])
    with pytest.raises(ValueError, match="samples without a class number"):
        chosen.check([shard(tmp_path, [0, -1])])
    with pytest.raises(ValueError, match="leaves out every label"):
        chosen.check([shard(tmp_path, [2, 2])])
    with pytest.raises(ValueError, match=r"has rows for 3 labels, but data\.classes lists 2 classes"):
        chosen.check([shard(tmp_path, [0, 1], classes=(7, 9))])
    (tmp_path / "classes.json").write_text(json.dumps(["a", "b", "c", "d"]))
    with pytest.raises(ValueError, match=r"has rows for 3 labels, but .*classes\.json lists 4 classes"):
        chosen.check([shard(tmp_path, [0, 1])])


def test_real_labels_are_timms(tmp_path):
    """timm's RealLabelsImagenet on ImageNet's 50,000 names; predictions of random classes near the right ones."""
    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 50001)]
    theirs = RealLabelsImagenet(names)
    generator = torch.Generator().manual_seed(0)
    task = RealLabels(recipe_of(tmp_path, 1000), "real")
    assert task.classes is None
    sums, parts = 0, torch.arange(50000)[::9].split(1000)
    task.normalise = lambda images: images
    for part in parts:
        logits = torch.randn(len(part), 1000, generator=generator)
        for row, number in enumerate(part.tolist()):
            for label in theirs.real_labels[names[number]]:
                logits[row, label] += 3
        keys = [f"n01440764/{names[number].removesuffix('.JPEG')}" for number in part.tolist()]
        batch = {"image": logits, "key": keys, "weight": torch.ones(len(part)), "label": [None] * len(part)}
        sums = sums + task.validation_sums(lambda images: images, batch)
        for row, number in enumerate(part.tolist()):
            theirs.sample_idx = number
            theirs.add_result(logits[row : row + 1])
    found = task.metrics(sums)
    assert found["accuracy"] == pytest.approx(theirs.get_accuracy(1) / 100)
    assert found["accuracy_top5"] == pytest.approx(theirs.get_accuracy(5) / 100)
    assert 0.2 < found["accuracy"] < found["accuracy_top5"] < 0.95
    assert found["samples"] == len(theirs.is_correct[1]) < len(torch.arange(50000)[::9])


def test_labels_of_a_file(tmp_path):
    (tmp_path / "right.json").write_text(json.dumps({"a": [0, 2], "b": [], "folder/c": [1]}))
    task = RealLabels(recipe_of(tmp_path, 3), str(tmp_path / "right.json"))
    logits = torch.eye(3)[[2, 0, 0, 1]]
    # The last is a blank image in place of an undecodable one; its key is a number.
    found = measure(task, logits, [], ["x/a", "b", "folder/c", "17"], weight=[1, 1, 1, 0])
    assert found == {"accuracy": 0.5, "samples": 2}
    task.check_samples(None, [shard(tmp_path, [], ["x/a", "b"]), shard(tmp_path, [], ["folder/c"])])
    with pytest.raises(ValueError, match=r"right\.json: has no entry for 2 samples of data\.val: c, d; name each"):
        task.check_samples(None, [shard(tmp_path, [], ["a", "c", "d"])])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": [3]}', r"right\.json: a: \[3\] is no list of class numbers of this model \(0 to 2\)"),
        ('{"a": 1}', r"right\.json: a: 1 is no list"),
        ("[[0], [true]]", r"right\.json: ILSVRC2012_val_00000002: \[True\] is no list"),
        ("{}", r"right\.json: should be a JSON object"),
        ("{", r"--labels .*right\.json: must be 'real', or a JSON file"),
    ],
)
def test_wrong_labels_are_an_error(tmp_path, text, message):
    (tmp_path / "right.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_right_labels(str(tmp_path / "right.json"), 3)


def test_real_labels_need_imagenets_classes():
    with pytest.raises(ValueError, match="holds classes of ImageNet-1K, 1000; the model has 10"):
        read_right_labels("real", 10)


def test_names_of_imagenets_images():
    right = {"ILSVRC2012_val_00000293": [0]}
    for key in (
        "ILSVRC2012_val_00000293",
        "n01440764/ILSVRC2012_val_00000293_n01440764",
        "val/ILSVRC2012_val_00000293",
    ):
        assert name_of(key, right) == "ILSVRC2012_val_00000293"
    assert name_of("ILSVRC2012_val_00000294", right) is None and name_of("293", right) is None
