"""Problems between keys of a recipe, which no section can see alone.

They are looked for when a recipe is read to be run. The recipe of an old checkpoint is not refused for them: what had
no effect then has none now.
"""

from __future__ import annotations

from collections.abc import Iterator

from dsmim.recipe.schema import Recipe


def contradictions(recipe: Recipe) -> list[str]:
    """Return one line per problem, with the key and the fix."""
    return [*_sizes(recipe), *_mixing(recipe)]


def _sizes(recipe: Recipe) -> Iterator[str]:
    """Yield numbers that do not divide one another."""
    batch, task, model = recipe.batch, recipe.task, recipe.model
    if batch.micro_batch != "auto" and batch.global_batch % batch.micro_batch:
        yield f"batch.global_batch: {batch.global_batch} is not a multiple of batch.micro_batch {batch.micro_batch}"
    if task.name == "simmim" and model.img_size % task.mask_patch:
        yield f"task.mask_patch: {task.mask_patch} does not divide model.img_size {model.img_size}"


def _mixing(recipe: Recipe) -> Iterator[str]:
    """Yield what prevents that neighbours are mixed."""
    task, batch, repeats = recipe.task, recipe.batch, recipe.data.repeats
    if task.name != "classify" or not task.mixes:
        return
    for key in ("global_batch", "micro_batch"):
        size = getattr(batch, key)
        if size != "auto" and (problem := task.odd_batch(f"batch.{key}", size)):
            yield problem
    if repeats > 1:
        yield (
            f"data.repeats: {repeats} shows each sample {repeats} times in a row; mixup and CutMix pair neighbours, so "
            "they would mix an image with itself; set data.repeats=1, or task.mixup=0 and task.cutmix=0"
        )
