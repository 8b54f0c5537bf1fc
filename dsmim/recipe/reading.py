"""Recipes in: YAML and overrides become a Recipe, with every error at once."""

from __future__ import annotations

import copy
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dsmim.recipe.errors import RecipeError, explain
from dsmim.recipe.schema import Recipe

# Keys that may differ at a resume: they change how fast or how observably a run goes, not what it learns. data.train
# may name other paths because the fingerprint of what lies there may not differ.
FREE_KEYS = (
    "data.train", "data.val", "data.index_dir", "data.subset", "data.workers", "data.cache_dir",
    "data.cache_gb", "data.allow_pipe", "data.max_undecodable",
    "model.grad_checkpointing", "model.grad_checkpointing_stages", "model.sequential_stages", "model.compile",
    "batch.micro_batch", "batch.eval_batch", "engine.deepspeed", "engine.max_skipped", "engine.max_loss_growth",
    "engine.timeout_minutes", "engine.step_timeout_minutes",
    "validation", "checkpoint", "log",
)  # fmt: skip


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice instead of keeping the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"key given twice: {', '.join(twice)}", node.start_mark)
        return super().construct_mapping(node, deep)


def shipped_recipes() -> dict[str, Path]:
    """Name → file of every recipe that comes with dsmim."""
    folder = Path(str(resources.files("dsmim"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(source: str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe by its shipped name or its path, apply `key=value` overrides, validate.

    Raises RecipeError (a ValueError) that lists every problem, each with its key and the mend.
    """
    return apply_overrides(_read_yaml(_locate(source)), source, overrides)


def apply_overrides(tree: dict[str, Any], source: str, overrides: list[str] | tuple[str, ...]) -> Recipe:
    """The recipe that a tree of keys describes, with `key=value` overrides applied. Raises RecipeError."""
    tree = copy.deepcopy(tree)
    problems = [problem for item in overrides if (problem := _override(tree, item))]
    return parse_recipe(tree, source, problems)


def parse_recipe(tree: dict[str, Any], source: str, problems: list[str] | None = None) -> Recipe:
    """Validate a recipe that was read already; `problems` found before are reported along."""
    problems = list(problems or [])
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(source, problems + explain(error, Recipe)) from None
    problems += _contradictions(recipe)
    if problems:
        raise RecipeError(source, problems)
    return recipe


def differences(old: Recipe, new: Recipe) -> list[str]:
    """`key: old → new` for every key that changes what is learned."""
    before, after = (_flatten(r.model_dump(mode="json")) for r in (old, new))
    free = tuple(key + "." for key in FREE_KEYS)
    changed = [k for k in before | after if before.get(k) != after.get(k) and not (k + ".").startswith(free)]
    return [f"{key}: {before.get(key)} → {after.get(key)}" for key in changed]


def _locate(source: str) -> Path:
    shipped = shipped_recipes()
    path = shipped.get(source, Path(source))
    if not path.is_file():
        raise RecipeError(source, [f"no such file, and no shipped recipe of that name ({', '.join(shipped)})"])
    return path


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(), Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise RecipeError(str(path), [f"not valid YAML: {error}"]) from None
    if not isinstance(tree, dict):
        raise RecipeError(str(path), ["the file must hold a mapping of keys to values"])
    return tree


def _override(tree: dict[str, Any], item: str) -> str | None:
    """Apply one `a.b=value` in place; gives the problem, or None."""
    key, equals, text = item.partition("=")
    if not equals or not key:
        return f"override {item!r} is not of the form key=value"
    *parents, leaf = key.split(".")
    for part in parents:
        if tree.get(part) is None:
            tree[part] = {}
        tree = tree[part]
        if not isinstance(tree, dict):
            return f"override {item!r}: {part} holds a value, not a section"
    try:
        tree[leaf] = text if text.startswith("*") else yaml.safe_load(text)  # a glob is no YAML alias
    except yaml.YAMLError as error:
        return f"override {item!r}: the value is not valid YAML ({error})"
    return None


def _contradictions(recipe: Recipe) -> list[str]:
    """Problems between sections, which no section can see alone."""
    batch, problems = recipe.batch, []
    if batch.micro_batch != "auto" and batch.global_batch % batch.micro_batch:
        problems.append(
            f"batch.global_batch: {batch.global_batch} is not a multiple of batch.micro_batch {batch.micro_batch}"
        )
    if recipe.task.name == "simmim" and recipe.model.img_size % recipe.task.mask_patch:
        problems.append(
            f"task.mask_patch: {recipe.task.mask_patch} does not divide model.img_size {recipe.model.img_size}"
        )
    mixes = recipe.task.name == "classify" and (recipe.task.mixup or recipe.task.cutmix)
    if mixes and (batch.global_batch % 2 or (batch.micro_batch != "auto" and batch.micro_batch % 2)):
        problems.append("batch: mixup and cutmix pair neighbours, so global_batch and micro_batch must be even")
    return problems


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat
