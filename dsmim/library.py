"""dsmim.load: a trained network and the transform of its images, for notebooks and other Python code."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import ValidationError
from timm.data import resolve_data_config
from torch import nn

from dsmim.checkpoint import reading
from dsmim.data.decode import Buffer
from dsmim.data.inputs import pixels_of
from dsmim.data.normalisation import IMAGENET, Channels, Normalisation, as_stored, chosen_or_default, normalisation
from dsmim.data.transforms import eval_crop
from dsmim.evaluate import recipe_of, weights_for
from dsmim.models import SimMIM, create_model, materialise
from dsmim.models.foreign import PREFIX
from dsmim.recipe import Augment, Data, Model, Recipe
from dsmim.recipe.errors import explain
from dsmim.recipe.pixels import pixel_problems
from dsmim.recipe.reading import stored_recipe
from dsmim.recipe.section import Section
from dsmim.tasks import build_task
from dsmim.tasks.base import ARCHITECTURE
from dsmim.weights import files, for_timm, heads, layouts
from dsmim.weights.match import LoadReport, State, Weights, match

_WANTED = "give a run directory, one of its checkpoints, or a file that `dsmim export` wrote"
_PREPARATION = ("eval_crop_ratio", "eval_interpolation")
_NORMALISATION = ("mean", "std")


@dataclass(frozen=True)
class EvalTransform:
    """The preparation of an image for the network, as `dsmim evaluate` does it.

    Takes encoded bytes, the path of an image file, a PIL image, or a uint8 tensor (C, H, W) of the network's channels
    (for 3, also of 1); gives float32 (C, img_size, img_size), normalised. Bytes and paths are decoded as in training.
    An EXIF orientation is not applied, as in training. Raises ValueError for anything else, for an image without
    pixels, and for what no decoder reads.
    """

    img_size: int
    augment: Augment
    """Of it, eval_crop_ratio and eval_interpolation count."""
    mean: Channels = IMAGENET.mean
    """Per channel, of pixels from 0 to 1."""
    std: Channels = IMAGENET.std

    def __call__(self, image: Buffer | str | Path | Image.Image | torch.Tensor) -> torch.Tensor:
        pixels = pixels_of(image, len(self.mean))  # (C, H, W)
        cropped = eval_crop(self.augment, self.img_size)(pixels)  # (C, img_size, img_size)
        return Normalisation(self.mean, self.std)(cropped.unsqueeze(0))[0]


@dataclass(frozen=True, eq=False)  # two networks are equal only if they are the same one
class Loaded:
    """A network with its weights, and the transform of its images. Unpacks as `model, transform = dsmim.load(…)`."""

    model: nn.Module
    """In evaluation mode, fp32, on the CPU; its parameters take gradients."""
    transform: EvalTransform
    source: str
    """The checkpoint or file that the weights are from."""
    recipe: Recipe | None = None
    """What it was trained with: a checkpoint's whole recipe, the part of it that an export carries, or None."""
    report: LoadReport | None = None
    """What became of every tensor of a file. None for a checkpoint, of which every tensor is used."""

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.transform))


def load(path: str | Path, name: str | None = None, *, ema: bool = False, **settings: Any) -> Loaded:
    """Load a trained network and the transform of its images.

    path: a run directory (its newest valid checkpoint counts), a checkpoint, or a file or folder that `dsmim export`
    wrote. They say which network it is. ema: the moving average of a checkpoint's weights instead of the weights.

    The model is what was trained: the classifier, or after SimMIM pre-training the SimMIM, whose network is its
    `.encoder`. An export of a SimMIM run without mask token and decoder (`--to timm`) gives the encoder alone.

    Other files do not say enough (an `--to authors` .pth among them). Name their network as create_model does:
    `dsmim.load(path, name="swinv2_base", img_size=192, window_size=12)`. Layouts are those of `model.weights` in a
    recipe. `num_classes` is the file's; 0 leaves its head out. The transform follows the settings `eval_crop_ratio`,
    `eval_interpolation`, `mean` and `std`, which default to a recipe's (data.augment, data.mean). For `timm:NAME` these
    and img_size default to timm's own configuration of that network.

    Raises ValueError, which names path and fix, when there are no such weights, or when any tensor of the network would
    stay untrained.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or directory; {_WANTED}")
    if path.is_dir() and not (path / for_timm.CONFIG).is_file():
        return _from_run(path, ema, {"name": name, **settings} if name else settings)
    if ema:
        raise ValueError(f"{path}: ema=True is for runs and checkpoints; for a file, use `dsmim export --ema`")
    weights = files.read(path / for_timm.WEIGHTS if path.is_dir() else path)
    return _from_export(weights, settings) if name is None else _from_others(weights, name, settings)


def _from_run(path: Path, ema: bool, settings: dict[str, Any]) -> Loaded:
    _refuse(settings, f"{path}: a run says which network it is")
    try:
        found = reading.locate(path)
    except ValueError as error:
        raise ValueError(f"{error}\n{_WANTED}") from None
    recipe = recipe_of(found, [])
    task = build_task(_for_inference(recipe))
    state = weights_for(task, found, "ema" if ema else "fp32")
    return Loaded(_filled(task.model, state), _transform(recipe), str(found), recipe)


def _from_export(weights: Weights, settings: dict[str, Any]) -> Loaded:
    told = weights.metadata.get("recipe")
    if told is None:
        example = f'dsmim.load({weights.source!r}, name="swinv2_base", img_size=192, window_size=12)'
        raise ValueError(
            f"{weights.source}: does not say which network its weights belong to, nor how images are prepared for it; "
            f"give the network as create_model takes it, for example {example}"
        )
    _refuse(settings, f"{weights.source}: the file says which network it is")
    recipe = stored_recipe(as_stored(_parsed(told, weights.source)), weights.source)
    model = build_task(_for_inference(recipe)).model
    if isinstance(model, SimMIM) and not any(key.endswith("mask_token") for key in weights.tensors):
        model = model.encoder
    if recipe.task.name == "classify":
        _check_head(model, weights, f"num_classes={recipe.task.num_classes} in the file's recipe", "export it again")
    return _matched(model, weights, recipe.task.name == "classify", _transform(recipe), recipe)


def _from_others(weights: Weights, name: str, settings: dict[str, Any]) -> Loaded:
    known = [*ARCHITECTURE, "num_classes", *_PREPARATION, *_NORMALISATION]
    if unknown := sorted(settings.keys() - set(known)):
        raise ValueError(f"dsmim.load has no setting {unknown[0]}; with name= there are {', '.join(known)}")
    architecture = {key: settings[key] for key in ARCHITECTURE if settings.get(key) is not None}
    preparation = {key: settings[key] for key in _PREPARATION if key in settings}
    _check(Model, {"name": name, "img_size": 1} | architecture)  # a network of timm may set its own img_size
    _check(Augment, preparation)
    pixels = _chosen_normalisation(name, architecture, {key: settings.get(key) for key in _NORMALISATION})
    model = create_model(name, "meta", num_classes=0, **architecture)
    transform = _transform_of_others(name, model, architecture.get("img_size"), preparation, pixels, weights.source)
    classes = _chosen_classes(settings["num_classes"]) if "num_classes" in settings else _classes(weights, model)
    if classes:
        model = create_model(name, "meta", num_classes=classes, **architecture)
        _check_head(model, weights, f"num_classes={classes}", "leave num_classes out")
    return _matched(model, weights, classes > 0, transform, None)


def _matched(
    model: nn.Module, weights: Weights, has_head: bool, transform: EvalTransform, recipe: Recipe | None
) -> Loaded:
    report, state = match(model, weights, "keep" if has_head else None)
    if report.fresh:
        raise ValueError(f"{weights.source}: has no weights for {', '.join(report.fresh)}; they would stay untrained")
    for note in report.notes:
        warnings.warn(f"{weights.source}: {note}", stacklevel=4)
    return Loaded(_filled(model, state), transform, weights.source, recipe, report)


def _filled(model: nn.Module, state: State) -> nn.Module:
    for _ in materialise(model, state):
        pass
    return model.eval()


def _for_inference(recipe: Recipe) -> Recipe:
    """Leave out of a recipe what makes training faster or smaller, and inference slower."""
    plain = {"compile": False, "grad_checkpointing": 0, "grad_checkpointing_stages": None}
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=plain)})


def _transform(recipe: Recipe) -> EvalTransform:
    pixels = normalisation(recipe)
    return EvalTransform(recipe.model.img_size, recipe.data.augment, pixels.mean, pixels.std)


def _chosen_normalisation(name: str, architecture: dict[str, Any], chosen: dict[str, Any]) -> Normalisation:
    """Return the normalisation of a network that no recipe describes."""
    _check(Data, chosen)
    network, data = Model(**{"name": name, "img_size": 1} | architecture), Data(**chosen)
    if problems := pixel_problems(network.in_chans, data):
        raise ValueError(f"dsmim.load: {'; '.join(problems)}")
    return chosen_or_default(network, data)


def _transform_of_others(
    name: str, network: nn.Module, img_size: int | None, chosen: dict[str, Any], pixels: Normalisation, source: str
) -> EvalTransform:
    if not name.startswith(PREFIX):
        if img_size is None:
            raise ValueError(f"{source}: does not say for which images its weights are; give img_size, their side")
        return EvalTransform(img_size, Augment(**chosen), pixels.mean, pixels.std)
    theirs = resolve_data_config(model=network)
    if theirs["crop_mode"] != "center":
        raise ValueError(f"{name}: timm prepares its images by {theirs['crop_mode']!r}, dsmim crops the centre only")
    own = {"eval_crop_ratio": theirs["crop_pct"], "eval_interpolation": theirs["interpolation"]}
    return EvalTransform(img_size or theirs["input_size"][-1], Augment(**own | chosen), pixels.mean, pixels.std)


def _classes(weights: Weights, headless: nn.Module) -> int:
    """Return the number of classes of a file's head; 0 without a head."""
    return max(map(len, _head(headless, weights).values()), default=0)


def _head(model: nn.Module, weights: Weights) -> State:
    """Return the tensors of a file's head, with the model's names."""
    native = layouts.to_native(weights.tensors, model.state_dict(), weights.source).tensors
    return {name: native[name] for name in heads.head_names(model, native)}


def _check_head(model: nn.Module, weights: Weights, asked: str, fix: str) -> None:
    """Check that the file and the model have a head for the same number of classes."""
    theirs, own = _head(model, weights), model.state_dict()
    if not theirs or not heads.head_names(model, own):
        headless = "the network" if theirs else weights.source
        raise ValueError(f"{asked}: {headless} has no classification head; {fix}")
    for name, tensor in theirs.items():
        if name in own and len(own[name]) != len(tensor):
            raise ValueError(
                f"{asked}: {weights.source} has {name} of shape {tuple(tensor.shape)}, the model "
                f"{tuple(own[name].shape)}; {fix}"
            )


def _chosen_classes(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise ValueError(
            f"num_classes={number!r}: give a whole number, 0 for the network without a head, or leave it out for the "
            "file's number"
        )
    return number


def _check(section: type[Section], settings: dict[str, Any]) -> None:
    """Check settings as those of a recipe; but the text "32" is no number."""
    listed = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    try:
        section.model_validate(listed, strict=True)
    except ValidationError as error:
        raise ValueError(f"dsmim.load: {'; '.join(explain(error, section))}") from None


def _refuse(settings: dict[str, Any], reason: str) -> None:
    if settings:
        raise ValueError(f"{reason}; leave out {', '.join(settings)}")


def _parsed(told: Any, source: str) -> dict[str, Any]:
    try:
        return json.loads(told)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source}: the recipe in its metadata cannot be read ({error}); export it again") from None
