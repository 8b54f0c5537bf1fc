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


MIXING = {"name": "classify", "num_classes": 3, "mixup": 0.8}


@pytest.mark.parametrize(
    ("task", "batch", "world", "micro"),
    [
        ("simmim", {"global_batch": 96}, 2, 48),
        ("simmim", {"global_batch": 96, "max_micro_batch": 48}, 2, 48),
        ("simmim", {"global_batch": 96, "max_micro_batch": 47}, 2, 24),
        ("simmim", {"global_batch": 96, "max_micro_batch": 3}, 2, 3),
        ("simmim", {"global_batch": 96, "max_micro_batch": 500}, 32, 3),
        (MIXING, {"global_batch": 60, "max_micro_batch": 15}, 2, 10),  # 15 divides the share of 30, but is odd
        ("simmim", {"global_batch": 96, "max_micro_batch": 3, "micro_batch": 12}, 2, 12),  # auto alone has a limit
    ],
)
def test_the_micro_batch_of_auto_has_a_limit(tmp_path, task, batch, world, micro):
    settings = TASKS[task] if isinstance(task, str) else task
    recipe = parse_recipe(tiny_recipe(tmp_path, task=settings, batch=batch), "tiny")
    found = plan(recipe, build_task(recipe), 53, world, None)
    assert found.micro_batch == micro
    assert found.micro_batch * found.accumulation * world == batch["global_batch"]


@pytest.mark.parametrize(
    ("batch", "world", "micro"),
    [
        ({}, 1, 12),  # not larger than before
        ({"max_micro_batch": 24}, 1, 24),  # the limit alone, if there is one
        ({"max_micro_batch": 6}, 2, 6),
        ({"max_micro_batch": 24, "micro_batch": 8}, 1, 8),
    ],
)
def test_the_limit_holds_at_a_resume_too(tmp_path, batch, world, micro):
    recipe, task = build(tmp_path, "simmim", batch={"global_batch": 96} | batch)
    assert plan(recipe, task, 53, world, {"micro_batch": 12}).micro_batch == micro


def test_a_batch_that_mixing_or_the_ranks_cannot_share_is_an_error(tmp_path):
    batch = {"global_batch": 6, "max_micro_batch": 4}
    recipe = parse_recipe(tiny_recipe(tmp_path, task=MIXING, batch=batch), "tiny")
    with pytest.raises(ValueError, match="no micro batch of 1 to 4 fits a share of 3 samples per rank"):
        plan(recipe, build_task(recipe), 53, 2, None)
    with pytest.raises(ValueError, match=r"batch\.global_batch: 6 is not a multiple of 4 ranks"):
        plan(recipe, build_task(recipe), 53, 4, None)
