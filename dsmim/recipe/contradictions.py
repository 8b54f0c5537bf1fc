"""Problems between keys of a recipe, which no section can see alone.

They are looked for when a recipe is read to be trained. The recipe of a checkpoint is not refused for them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from dsmim.recipe.pixels import pixel_problems
from dsmim.recipe.schema import Recipe
from dsmim.recipe.section import Section


def contradictions(recipe: Recipe) -> list[str]:
    """Return one line per problem, with the key and the fix."""
    checks = (_sizes, _mixing, _pixels, _without_effect, _frozen, _given_otherwise, _rates, _best)
    return [problem for check in checks for problem in check(recipe)]


def _sizes(recipe: Recipe) -> Iterator[str]:
    """Yield numbers that do not divide one another."""
    batch, task, model = recipe.batch, recipe.task, recipe.model
    if batch.micro_batch != "auto" and batch.global_batch % batch.micro_batch:
        yield f"batch.global_batch: {batch.global_batch} is not a multiple of batch.micro_batch {batch.micro_batch}"
    if task.name == "simmim" and model.img_size % task.mask_patch:
        yield f"task.mask_patch: {task.mask_patch} does not divide model.img_size {model.img_size}"
    if task.name == "simmim" and task.mask_ratio == 0:
        yield "task.mask_ratio: 0 hides no patch, so that there is nothing to learn"


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


def _pixels(recipe: Recipe) -> Iterator[str]:
    yield from pixel_problems(recipe.model.in_chans, recipe.data)


def _without_effect(recipe: Recipe) -> Iterator[str]:
    """Yield keys that differ from their default, but have no effect because another key is off."""
    model, data, optim, schedule = recipe.model, recipe.data, recipe.optim, recipe.schedule
    multistep = schedule.name == "multistep"
    yield from _unused(model, "model.grad_checkpointing_stages", model.grad_checkpointing, "model.grad_checkpointing")
    yield from _unused(model, "model.weights_head", model.weights, "model.weights")
    yield from _unused(data, "data.cache_gb", data.cache_dir, "data.cache_dir")
    yield from _unused(optim, "optim.lr_base_batch", optim.lr_scaling == "linear", "optim.lr_scaling=linear")
    yield from _unused(schedule, "schedule.gamma", multistep, "schedule.name=multistep")
    yield from _unused(schedule, "schedule.min_lr", not multistep, "schedule.name=cosine")
    if (task := recipe.task).name == "classify":
        yield from _unused(task, "task.mix_switch", task.mixup and task.cutmix, "both task.mixup and task.cutmix")
        yield from _unused(task, "task.mix_run", task.mixes, "task.mixup or task.cutmix")


def _frozen(recipe: Recipe) -> Iterator[str]:
    """Yield what contradicts a frozen encoder, or has no effect on it."""
    model, optim = recipe.model, recipe.optim
    if model.trainable == "all":
        return
    if recipe.task.name != "classify":
        yield f"model.trainable: {recipe.task.name} has no classifier; set task.name=classify, or model.trainable=all"
        return
    if model.weights is None:
        yield (
            "model.trainable: head leaves the rest at random first weights; give model.weights, or set "
            "model.trainable=all"
        )
    unfrozen = "model.trainable=all"
    yield from _unused(model, "model.drop_path_rate", False, unfrozen)
    yield from _unused(model, "model.grad_checkpointing", False, unfrozen)
    yield from _unused(optim, "optim.layer_decay", False, unfrozen)


def _unused(section: Section, key: str, used: object, needed: str) -> Iterator[str]:
    name = key.rsplit(".", 1)[-1]
    value, default = getattr(section, name), type(section).model_fields[name].default
    if value != default and not used:
        shown = "null" if default is None else default
        yield f"{key}: {value} has no effect without {needed}; give that, or set {key}={shown}"


def _given_otherwise(recipe: Recipe) -> Iterator[str]:
    """Yield options of timm's networks that the recipe has keys for, with another value."""
    model, task = recipe.model, recipe.task
    owners = {"img_size": ("model.img_size", model.img_size), "in_chans": ("model.in_chans", model.in_chans)}
    if task.name == "classify":
        owners["num_classes"] = ("task.num_classes", task.num_classes)
    if model.drop_path_rate:
        owners["drop_path_rate"] = ("model.drop_path_rate", model.drop_path_rate)
    for name, (key, value) in owners.items():
        if (given := model.options.get(name, value)) != value:
            yield f"model.options.{name}: {given} contradicts {key} {value}; remove it from model.options"
    if model.options.get("pretrained"):
        yield "model.options.pretrained: nothing is downloaded; remove it, and give a file of weights in model.weights"


def _rates(recipe: Recipe) -> Iterator[str]:
    """Yield learning rates above the peak, which the schedule would lower to it."""
    for name in ("min_lr", "warmup_lr"):
        if (rate := getattr(recipe.schedule, name)) > recipe.optim.lr:
            yield f"schedule.{name}: {rate:g} is above optim.lr {recipe.optim.lr:g}, the peak; set one of them"


def _best(recipe: Recipe) -> Iterator[str]:
    """Yield what would leave checkpoint.keep_best without any figure."""
    best, figures = recipe.checkpoint.keep_best, recipe.task.figures
    if best is None:
        return
    if recipe.data.val is None:
        yield "checkpoint.keep_best: needs a validation; set data.val, or checkpoint.keep_best=null"
    if best.metric not in figures:
        close = difflib.get_close_matches(best.metric, figures, n=1, cutoff=0.5)
        meant = f"; did you mean {close[0]}?" if close else ""
        known = ", ".join(figures)
        yield f"checkpoint.keep_best.metric: {recipe.task.name} measures {known}, no {best.metric!r}{meant}"
