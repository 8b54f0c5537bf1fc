"""Read a recipe from YAML and key=value overrides, and report all its errors at once."""

from __future__ import annotations

import copy
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dsmim.recipe.errors import RecipeError, explain, nearest
from dsmim.recipe.override_values import read_value
from dsmim.recipe.schema import Recipe

# Keys that may differ when a run resumes: they change its speed, or what is seen of it, not what it learns. data.train
# may name other paths, because the fingerprint of the shards there must be the same.
FREE_KEYS = (
    "data.train", "data.val", "data.index_dir", "data.subset", "data.workers", "data.cache_dir",
    "data.cache_gb", "data.allow_pipe", "data.max_undecodable",
    "model.grad_checkpointing", "model.grad_checkpointing_stages", "model.sequential_stages", "model.compile",
    "batch.micro_batch", "batch.eval_batch", "engine.deepspeed", "engine.max_skipped", "engine.max_loss_growth",
    "engine.timeout_minutes", "engine.step_timeout_minutes",
    "validation", "checkpoint", "log",
)  # fmt: skip


_NO_PERMISSION = (
    "data.allow_pipe: a file cannot allow commands, because it may come from others; remove it there, and give "
    "data.allow_pipe=true on the command line"
)


class _StrictLoader(yaml.SafeLoader):
    """A SafeLoader that refuses a key given twice, where YAML would silently keep the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"key given twice: {', '.join(twice)}", node.start_mark)
        return super().construct_mapping(node, deep)


def shipped_recipes() -> dict[str, Path]:
    """Return the file of every recipe that comes with dsmim, by its name."""
    folder = Path(str(resources.files("dsmim"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(source: str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Return the recipe of a shipped name or a path, with `key=value` overrides applied.

    Raises RecipeError (a ValueError) that lists every problem, each with its key and the fix.
    """
    return apply_overrides(_read_yaml(_locate(source)), source, overrides)


def apply_overrides(tree: dict[str, Any], source: str, overrides: list[str] | tuple[str, ...]) -> Recipe:
    """Return the recipe of a tree of keys, with `key=value` overrides applied. Raises RecipeError."""
    tree = copy.deepcopy(tree)
    problems = [problem for item in overrides if (problem := _override(tree, item))]
    return parse_recipe(tree, source, problems)


def parse_recipe(tree: dict[str, Any], source: str, problems: list[str] | None = None) -> Recipe:
    """Return the recipe of a tree of keys. Raises RecipeError, which lists `problems` found before too."""
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
    """Return `key: old → new` for every key that changes what is learned."""
    before, after = (_flatten(r.model_dump(mode="json")) for r in (old, new))
    free = tuple(key + "." for key in FREE_KEYS)
    changed = [k for k in before | after if before.get(k) != after.get(k) and not (k + ".").startswith(free)]
    return [f"{key}: {before.get(key)} → {after.get(key)}" for key in changed]


def _locate(source: str) -> Path:
    shipped = shipped_recipes()
    path = shipped.get(source, Path(source))
    if not path.is_file():
        raise RecipeError(source, [f"no such file, and no shipped recipe of that name{nearest(source, list(shipped))}"])
    return path


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(), Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(str(path), [f"not valid YAML: {error}"]) from None
    if not isinstance(tree, dict):
        raise RecipeError(str(path), ["the file must hold keys with values (key: value)"])
    if isinstance(data := tree.get("data"), dict) and data.get("allow_pipe"):
        raise RecipeError(str(path), [_NO_PERMISSION])
    return tree


def _override(tree: dict[str, Any], item: str) -> str | None:
    """Apply one `a.b=value` to the tree. Return the problem, or None."""
    key, equals, text = item.partition("=")
    if not equals or not key:
        return f"override {item!r} is not of the form key=value"
    *parents, leaf = key.split(".")
    for part in parents:
        if tree.get(part) is None:
            tree[part] = {}
        tree = tree[part]
        if not isinstance(tree, dict):
            return f"override {item!r}: {part} is a value, not a section with keys"
    try:
        tree[leaf] = read_value(key, text)
    except yaml.YAMLError as error:
        return f"override {item!r}: the value is not valid YAML ({error})"
    return None


def _contradictions(recipe: Recipe) -> list[str]:
    """Return the problems between sections, which no section can see alone."""
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
        problems.append(
            "batch: mixup and CutMix pair neighbours: batch.global_batch and batch.micro_batch must be even"
        )
    return problems


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat
