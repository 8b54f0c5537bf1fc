"""`dsmim export`: a checkpoint's weights for tools that know nothing of DeepSpeed, or to start another run from.

timm      timm's names, which are ours; mask token and decoder have no place there
authors   Swin V2: as the authors of SimMIM and Swin V2 release them, buffers included; DeiT III: as
          facebookresearch/deit
dsmim     our names, everything
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dsmim.checkpoint import reading, zero_shards
from dsmim.models import create_model, timm_arguments
from dsmim.models.foreign import PREFIX
from dsmim.models.swin_v2 import SwinTransformerV2
from dsmim.recipe import Recipe
from dsmim.weights import layouts
from dsmim.weights.match import State

LAYOUTS = ("timm", "authors", "dsmim")
SUFFIXES = (".safetensors", ".pth")
_SETTINGS = ("img_size", "window_size", "pretrained_window_sizes", "extra_norm_every")


def export(path: Path, out: Path, layout: str = "timm", which: str = "fp32") -> str:
    """Write a checkpoint's fp32 weights (or those of a run's newest valid one) in a layout. Gives how to load them.

    which: "fp32", or "ema" for the moving average; `out` says the kind of file: .safetensors, or .pth as
    torch.save({"model": …}). Raises ValueError when path is no checkpoint, or the network has no such layout.
    """
    assert layout in LAYOUTS, layout
    if out.suffix not in SUFFIXES:
        raise ValueError(f"{out}: the name says the kind of file, one of {', '.join(SUFFIXES)}")
    found = reading.locate(path)
    recipe = Recipe.model_validate(reading.read_state(found)["recipe"])
    write = {"timm": _timm, "authors": _authors, "dsmim": _dsmim}[layout]
    state, metadata, words = write(recipe, zero_shards.weights(found, which), out)
    metadata |= {"source": recipe.name, "recipe": json.dumps(_learned(recipe))}
    _save(state, {"format": "pt", **metadata}, out, bare=layout == "authors")
    return words


def _timm(recipe: Recipe, weights: State, out: Path) -> tuple[State, dict[str, str], str]:
    entry, arguments = timm_arguments(recipe.model.name, num_classes=_classes(recipe), **_settings(recipe))
    arguments = {key: value for key, value in arguments.items() if value is not None}
    state, left = _encoder(weights)
    listed = "".join(f"{key}={value!r}, " for key, value in arguments.items())
    metadata = {"architecture": entry, "model_args": json.dumps(arguments, default=repr)}
    return state, metadata, f"{left}timm.create_model({entry!r}, {listed}checkpoint_path={str(out)!r})"


def _dsmim(recipe: Recipe, weights: State, out: Path) -> tuple[State, dict[str, str], str]:
    arguments = {"name": recipe.model.name, "num_classes": _classes(recipe), **_settings(recipe)}
    metadata = {"architecture": recipe.model.name, "model_args": json.dumps(arguments)}
    return weights, metadata, f"dsmim train RECIPE model.weights={out}"


def _authors(recipe: Recipe, weights: State, out: Path) -> tuple[State, dict[str, str], str]:
    name, left = recipe.model.name, ""
    if name.startswith(PREFIX):
        raise ValueError(f"{name}: there is no authors' layout for networks of timm; use --to timm")
    model = create_model(name, device="meta", **_settings(recipe))
    if isinstance(model, SwinTransformerV2):
        state = swin_as_authors(model, weights, simmim=recipe.task.name == "simmim")
    else:
        weights, left = _encoder(weights, "facebookresearch/deit")
        state = _renamed(weights, layouts.to_deit)
    words = f"torch.load({str(out)!r}, weights_only=True)['model']"
    if out.suffix == ".safetensors":
        words = f"safetensors.torch.load_file({str(out)!r})"
    return state, {"architecture": name}, f"{left}{words}"


def swin_as_authors(model: SwinTransformerV2, weights: State, simmim: bool) -> State:
    """Weights of the network, or of SimMIM around it, with the authors' names and buffers."""
    buffers = {f"{'encoder.' * simmim}{name}": buffer for name, buffer in _buffers(model).items()}
    if simmim:  # a parameter of the encoder there
        weights = {"encoder." * (name == "mask_token") + name: tensor for name, tensor in weights.items()}
    return _renamed(weights | buffers, lambda name: layouts.to_swin_authors(name, simmim))


def _renamed(state: State, rename: Callable[[str], str]) -> State:
    renamed = {rename(name): tensor for name, tensor in state.items()}
    assert len(renamed) == len(state), "two tensors got one name"
    return renamed


def _buffers(model: SwinTransformerV2) -> State:
    """Those that the authors' files hold beside the weights: per block two of its attention's, and its shift's mask."""
    buffers = {}
    for number, stage in enumerate(model.layers):
        for place, block in enumerate(stage.blocks):
            name, attn = f"layers.{number}.blocks.{place}", block.attn
            side, tokens = 2 * attn.window - 1, attn.window**2
            buffers[f"{name}.attn.relative_coords_table"] = attn.coordinates.view(1, side, side, 2)
            buffers[f"{name}.attn.relative_position_index"] = attn.pairs.view(tokens, tokens)
            if block.mask is not None:
                buffers[f"{name}.attn_mask"] = block.mask
    return buffers


def _encoder(weights: State, whose: str = "timm") -> tuple[State, str]:
    """The network without what masked image modelling adds, and a line that says what is left out."""
    if "mask_token" not in weights:
        return weights, ""
    prefix = "encoder."
    kept = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    dropped = ", ".join(key for key in weights if not key.startswith(prefix))
    return kept, f"# left out (no place in {whose}): {dropped}\n"


def _settings(recipe: Recipe) -> dict[str, Any]:
    """What of recipe.model shapes the network; what is not set is not there."""
    found = recipe.model.model_dump(include=set(_SETTINGS))
    return {key: value for key, value in found.items() if value} | recipe.model.options


def _learned(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe travels with the weights, for dsmim.load: network, task, image preparation, training; not where
    files are."""
    kept = dict.fromkeys(("name", "seed", "task", "model", "batch", "optim", "schedule"), True)
    return recipe.model_dump(
        mode="json", include=kept | {"data": {"augment"}}, exclude={"model": {"weights", "weights_head"}}
    )


def _classes(recipe: Recipe) -> int:
    return recipe.task.num_classes if recipe.task.name == "classify" else 0


def _save(state: State, metadata: dict[str, str], out: Path, bare: bool) -> None:
    """bare: as a .pth of the authors, nothing beside the weights."""
    out.parent.mkdir(parents=True, exist_ok=True)
    state = {key: value.contiguous() for key, value in state.items()}
    if out.suffix == ".safetensors":
        save_file(state, str(out), metadata=metadata)
    else:
        torch.save({"model": state} if bare else {"model": state, "metadata": metadata}, out)
