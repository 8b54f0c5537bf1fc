"""What a task says that it measures is what it measures."""

import pytest
import torch

from dsmim.plan import plan
from dsmim.recipe.reading import parse_recipe
from dsmim.tasks import build_task
from tests.conftest import tiny_recipe

TASKS = {"simmim": {"name": "simmim", "mask_patch": 16}, "classify": {"name": "classify", "num_classes": 3}}


def build(tmp_path, task: str, **changes):
    recipe = parse_recipe(tiny_recipe(tmp_path, task=TASKS[task], **changes), "tiny")
    return recipe, build_task(recipe)


@pytest.mark.parametrize("name", TASKS)
def test_the_figures_are_those_of_the_metrics(tmp_path, name):
    _, task = build(tmp_path, name)
    assert tuple(task.metrics(torch.ones(3))) == task.figures


@pytest.mark.parametrize(
    ("name", "metric", "message"),
    [
        ("simmim", "accuracy", "'accuracy' is unknown; task simmim measures loss"),
        ("classify", "val_loss", "'val_loss' is unknown; task classify measures loss, accuracy; did you mean loss?"),
        ("classify", "acuracy", "measures loss, accuracy; did you mean accuracy?"),
        ("classify", "samples", "measures loss, accuracy"),
    ],
)
def test_keep_best_needs_a_figure_of_the_task(tmp_path, name, metric, message):
    recipe, task = build(tmp_path, name, checkpoint={"keep_best": {"metric": metric, "mode": "max"}})
    with pytest.raises(ValueError, match=r"checkpoint\.keep_best\.metric: ") as raised:
        plan(recipe, task, 53, 1, None)
    assert message in str(raised.value)


def test_keep_best_needs_a_validation(tmp_path):
    data = {"train": f"{tmp_path}/train-*.tar"}
    recipe, task = build(tmp_path, "simmim", data=data, checkpoint={"keep_best": {"metric": "loss", "mode": "min"}})
    with pytest.raises(ValueError, match=r"checkpoint\.keep_best: nothing is validated; give data\.val"):
        plan(recipe, task, 53, 1, None)


@pytest.mark.parametrize(
    ("checkpoint", "steps"),
    [
        ({"every": {"minutes": 10}}, [6]),
        ({"every": {"minutes": 10}, "keep_every": {"steps": 2}}, [2, 4, 6]),  # what is to be kept must be saved
        ({"every": {"steps": 3}, "keep_every": {"steps": 5}}, [3, 5, 6]),
        ({"every": {"steps": 4}}, [4, 6]),
    ],
)
def test_the_steps_that_save(tmp_path, checkpoint, steps):
    recipe, task = build(tmp_path, "simmim", checkpoint=checkpoint)
    saving = plan(recipe, task, 53, 1, None).saving
    assert [step for step in range(1, 7) if saving(step)] == steps
