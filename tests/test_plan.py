"""When a run saves."""

import pytest

from dsmim.plan import plan
from dsmim.recipe.reading import parse_recipe
from dsmim.tasks import build_task
from tests.conftest import tiny_recipe

TASKS = {"simmim": {"name": "simmim", "mask_patch": 16}, "classify": {"name": "classify", "num_classes": 3}}


def build(tmp_path, task: str, **changes):
    recipe = parse_recipe(tiny_recipe(tmp_path, task=TASKS[task], **changes), "tiny")
    return recipe, build_task(recipe)


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


@pytest.mark.parametrize(
    ("keep_every", "kept"), [(None, []), ({"epochs": 2}, [14, 28]), ({"steps": 5}, [5, 10, 15, 20, 25, 30])]
)
def test_what_is_to_be_kept_is_saved(tmp_path, keep_every, kept):
    """An epoch of 53 samples has 6.6 steps, and counts as 7; two have 13.25, and count as 14."""
    checkpoint = {"every": {"steps": 4}, "keep_every": keep_every}
    recipe, task = build(tmp_path, "simmim", schedule={"duration": {"steps": 33}}, checkpoint=checkpoint)
    found = plan(recipe, task, 53, 1, None)
    saved = [step for step in range(1, 34) if found.saving(step)]
    assert saved == sorted({4, 8, 12, 16, 20, 24, 28, 32, 33, *kept})
    assert [step for step in saved if found.keep_every and step % found.keep_every == 0] == kept
