"""Top-1 and top-5 against timm's accuracy, and the rules for ties and for NaN."""

import math

import pytest
import torch
from timm.utils import accuracy
from torch.nn import functional as F

from dsmim.recipe.reading import parse_recipe
from dsmim.tasks import build_task
from dsmim.tasks.per_class import Confusion
from dsmim.tasks.ranking import answers, places, tops
from tests.conftest import tiny_recipe

NAN = math.nan


def classifier(tmp_path, classes: int, kind=build_task):
    model = {"name": "swinv2_nano", "img_size": 32, "window_size": 4}
    task = {"name": "classify", "num_classes": classes}
    return kind(parse_recipe(tiny_recipe(tmp_path, task=task, model=model), "test"))


def one_hot(labels: torch.Tensor, classes: int) -> torch.Tensor:
    return F.one_hot(labels, classes).bool()


def test_the_figures_are_timms(tmp_path):
    torch.manual_seed(0)
    logits, labels = torch.randn(400, 20), torch.randint(20, (400,))
    task = classifier(tmp_path, 20)
    weight = torch.ones(400, dtype=torch.float64)
    weight[::7] = 0
    counted = weight > 0
    sums = sum(task.sums(*part) for part in zip(logits.split(90), labels.split(90), weight.split(90), strict=True))
    found = task.metrics(sums)
    top1, top5 = accuracy(logits[counted], labels[counted], topk=(1, 5))
    assert found["accuracy"] == pytest.approx(top1.item() / 100) and 0 < found["accuracy"] < found["accuracy_top5"]
    assert found["accuracy_top5"] == pytest.approx(top5.item() / 100)
    assert found["loss"] == pytest.approx(F.cross_entropy(logits[counted], labels[counted]).item())
    assert found["samples"] == counted.sum()


@pytest.mark.parametrize(("classes", "names"), [(2, 1), (5, 1), (6, 2), (1000, 2)])
def test_top_5_needs_more_than_5_classes(tmp_path, classes, names):
    recipe = parse_recipe(tiny_recipe(tmp_path, task={"name": "classify", "num_classes": classes}), "test")
    assert len(tops(classes)) == names and recipe.task.figures == ("loss", *tops(classes))


def test_keep_best_knows_top_5(tmp_path):
    best = {"keep_best": {"metric": "accuracy_top5", "mode": "max"}}
    tree = tiny_recipe(tmp_path, task={"name": "classify", "num_classes": 6}, checkpoint=best)
    parse_recipe(tree, "test")
    tree["task"]["num_classes"] = 5
    with pytest.raises(ValueError, match="classify measures loss, accuracy, no 'accuracy_top5'; did you mean accuracy"):
        parse_recipe(tree, "test")


def test_of_equal_scores_the_lower_class_is_first():
    scores = torch.tensor([[1.0, 3, 3, 3, 0, -math.inf]])
    assert [places(scores, one_hot(torch.tensor([label]), 6)).item() for label in range(6)] == [3, 0, 1, 2, 4, 5]
    scores = torch.zeros(1, 3000)  # sorts of this length use another algorithm
    assert places(scores, one_hot(torch.tensor([1234]), 3000)).item() == 1234


def test_of_several_right_classes_the_best_counts():
    scores = torch.tensor([[5.0, 4, 3, 2, 1, 0]] * 4)
    right = torch.zeros(4, 6, dtype=torch.bool)
    right[0, [4, 1]] = right[1, [5]] = right[2, [0, 5]] = True
    assert places(scores, right).tolist() == [1, 5, 0, 6]  # the last has no right class


def test_nan_is_never_right(tmp_path):
    """Neither the class whose score is NaN, which torch would put first, nor another one."""
    scores = torch.tensor([[NAN] * 6, [NAN] * 6, [0, 9, NAN, 0, 0, 0]])
    labels = torch.tensor([0, 3, 1])
    assert places(scores, one_hot(labels, 6)).tolist() == [6, 6, 6]
    assert answers(scores, labels).tolist() == [1, 0, 0]
    task = classifier(tmp_path, 6, Confusion)
    weight = torch.ones(3, dtype=torch.float64)
    sums = torch.cat([task.sums(scores, labels, weight), task.counts(answers(scores, labels), labels, weight)])
    found = task.metrics(sums)
    assert found["accuracy"] == found["accuracy_top5"] == 0 and found["samples"] == 3
    assert sum(row["samples"] for row in found["classes"]) == 3 and not any(row["accuracy"] for row in found["classes"])


def test_nan_of_padding_does_not_count(tmp_path):
    task = classifier(tmp_path, 6)
    scores = torch.tensor([[NAN] * 6, [9.0, 0, 0, 0, 0, 0]])
    found = task.metrics(task.sums(scores, torch.tensor([0, 0]), torch.tensor([0.0, 1.0], dtype=torch.float64)))
    assert found["accuracy"] == 1 and found["samples"] == 1 and math.isfinite(found["loss"])
