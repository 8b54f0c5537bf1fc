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
    checks = (
        _sizes, _mixing, _mix_runs, _losses, _pixels, _augmentations, _without_effect, _frozen, _given_otherwise,
        _rates, _best,
    )  # fmt: skip
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
    if repeats > 1 and batch.global_batch < 2 * repeats:
        yield (
            f"data.repeats: {repeats} copies of an image are more than half of batch.global_batch "
            f"{batch.global_batch}, so mixup and CutMix would mix it with itself; give batch.global_batch at least "
            f"{2 * repeats}, or set data.repeats=1"
        )


def _losses(recipe: Recipe) -> Iterator[str]:
    """Yield a loss that the targets leave without meaning."""
    task = recipe.task
    if task.name == "classify" and task.loss == "bce" and task.label_smoothing:
        yield (
            f"task.label_smoothing: {task.label_smoothing:g} makes every target larger than 0, and task.loss=bce "
            "counts such a target as 1: every class would be right; set task.label_smoothing=0, or "
            "task.loss=cross_entropy"
        )


def _mix_runs(recipe: Recipe) -> Iterator[str]:
    """Yield runs of mixing that do not fit into the global batch."""
    task, size = recipe.task, recipe.batch.global_batch
    if task.name == "classify" and task.mixes and task.mix_run != 2 and size % task.mix_run:
        yield f"task.mix_run: {task.mix_run} does not divide batch.global_batch {size}; set a divisor, or 2"


def _pixels(recipe: Recipe) -> Iterator[str]:
    yield from pixel_problems(recipe.model.in_chans, recipe.data)


def _augmentations(recipe: Recipe) -> Iterator[str]:
    """Yield augmentations of which timm, or the authors of 3-Augment, use only one."""
    augment = recipe.data.augment
    for key in ("three_augment", "color_jitter"):
        if augment.rand_augment and getattr(augment, key):
            off = "false" if key == "three_augment" else "null"
            yield (
                f"data.augment.{key}: RandAugment changes colours too, and published recipes use one of the two; set "
                f"data.augment.{key}={off} or data.augment.rand_augment=null"
            )


def _without_effect(recipe: Recipe) -> Iterator[str]:
    """Yield keys that differ from their default, but have no effect because another key is off."""
    model, data, optim, schedule = recipe.model, recipe.data, recipe.optim, recipe.schedule
    multistep, warmed = schedule.name == "multistep", any(schedule.warmup.model_dump().values())
    foreign = model.name.startswith("timm:")
    yield from _unused(model, "model.grad_checkpointing_stages", model.grad_checkpointing, "model.grad_checkpointing")
    for key in ("model.drop_path", "model.drop_path_rates"):
        yield from _unused(model, key, model.drop_path_rate, "model.drop_path_rate")
    yield from _unused(model, "model.weights_head", model.weights, "model.weights")
    yield from _unused(data, "data.cache_gb", data.cache_dir, "data.cache_dir")
    yield from _unused(optim, "optim.lr_base_batch", optim.lr_scaling == "linear", "optim.lr_scaling=linear")
    yield from _unused(schedule, "schedule.gamma", multistep, "schedule.name=multistep")
    yield from _unused(schedule, "schedule.min_lr", not multistep, "schedule.name=cosine")
    yield from _unused(schedule, "schedule.cosine", not multistep and warmed, "schedule.name=cosine and a warm-up")
    yield from _unused(schedule, "schedule.epoch", schedule.update == "epoch", "schedule.update=epoch")
    yield from _unused(schedule, "schedule.layer_scale", optim.layer_decay < 1, "optim.layer_decay below 1")
    yield from _unused(optim, "optim.ema_warmup", optim.ema_decay, "optim.ema_decay")
    yield from _unused(optim, "optim.model_no_decay", foreign, "a network of timm (model.name=timm:NAME)")
    yield from _unused(recipe.validation, "validation.ema", data.val, "data.val")
    yield from _unused(recipe.validation, "validation.ema", optim.ema_decay, "optim.ema_decay")
    random_resized = data.augment.crop == "random_resized"
    for key in ("crop_scale", "crop_ratio"):
        yield from _unused(data.augment, f"data.augment.{key}", random_resized, "data.augment.crop=random_resized")
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
        value, default = (list(v) if isinstance(v, tuple) else v for v in (value, default))
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
    """Yield what would leave checkpoint.keep_best without any figure, or make it keep the worst checkpoint."""
    best, figures = recipe.checkpoint.keep_best, recipe.task.figures
    if recipe.validation.ema:
        figures = (*figures, *(f"ema_{name}" for name in figures))
    if best is None:
        return
    if recipe.data.val is None:
        yield "checkpoint.keep_best: needs a validation; set data.val, or checkpoint.keep_best=null"
    better = "min" if best.metric.removeprefix("ema_") == "loss" else "max"  # all others are accuracies
    if best.metric in figures and best.mode != better:
        small = "small" if better == "min" else "large"
        yield (
            f"checkpoint.keep_best.mode: {best.mode} would keep the worst checkpoint, because {best.metric} is better "
            f"when it is {small}; set checkpoint.keep_best.mode={better}"
        )
    if best.metric not in figures:
        close = difflib.get_close_matches(best.metric, figures, n=1, cutoff=0.5)
        meant = f"; did you mean {close[0]}?" if close else ""
        known = ", ".join(figures)
        if best.metric.removeprefix("ema_") in figures:
            meant = "; set validation.ema=true, or another metric"
        yield f"checkpoint.keep_best.metric: {recipe.task.name} measures {known}, no {best.metric!r}{meant}"
