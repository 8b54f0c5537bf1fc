"""`dsmim export`: write a checkpoint's weights for tools that don't know DeepSpeed, or for the start of another run.

timm      timm's names, which are also dsmim's; without mask token and decoder, which timm does not have; a file, or a
          folder with timm's config.json
authors   Swin V2: as the authors of SimMIM and Swin V2 release them, with their buffers; DeiT III: as
          facebookresearch/deit
dsmim     dsmim's names, everything
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dsmim.checkpoint import reading, zero_shards
from dsmim.data.normalisation import settled
from dsmim.models import create_model, timm_arguments
from dsmim.models.foreign import PREFIX
from dsmim.models.swin_v2 import SwinTransformerV2
from dsmim.recipe import Recipe
from dsmim.shards.atomic import partial_file, remove_leftovers
from dsmim.weights import for_timm, layouts
from dsmim.weights.match import State

LAYOUTS = ("timm", "authors", "dsmim")
SUFFIXES = (".safetensors", ".pth")
_SETTINGS = ("img_size", "in_chans", "window_size", "pretrained_window_sizes", "extra_norm_every", "options")


def export(path: Path, out: Path, layout: str = "timm", which: str = "fp32") -> str:
    """Write the fp32 weights of a checkpoint, or of a run's newest valid checkpoint, in a layout.

    Return the line that loads the file. which: "fp32", or "ema" for the moving average. The suffix of `out` decides the
    kind of file: .safetensors, or .pth, written by torch.save({"model": …}). In timm's layout it may also be a folder:
    one that exists, or a name without suffix; see for_timm.py. Raises ValueError when path is not a checkpoint, or the
    network has no such layout.
    """
    assert layout in LAYOUTS, layout
    folder = layout == "timm" and (out.is_dir() or not out.suffix)
    if out.suffix not in SUFFIXES and not folder:
        raise ValueError(
            f"{out}: the suffix decides the kind of file; it must be one of {', '.join(SUFFIXES)} (--to timm: or none, "
            "for a folder)"
        )
    found = reading.locate(path)
    recipe = settled(Recipe.model_validate(reading.read_state(found)["recipe"]))
    write = {"timm": _timm_folder if folder else _timm, "authors": _authors, "dsmim": _dsmim}[layout]
    state, metadata, how_to_load = write(recipe, zero_shards.read_weights(found, which), out)
    metadata |= {"source": recipe.name, "recipe": json.dumps(_learned(recipe))}
    file = out / for_timm.WEIGHTS if folder else out
    _save(state, {"format": "pt", **metadata}, file, bare=layout == "authors")
    return how_to_load


def _timm(recipe: Recipe, weights: State, out: Path) -> tuple[State, dict[str, str], str]:
    entry, arguments = _timm_arguments(recipe)
    state, left_out = _encoder(weights)
    prepared = for_timm.preparation(recipe, _classes(recipe))
    listed = "".join(f"{key}={_code(value)}, " for key, value in arguments.items())
    how_to_load = (
        f"timm.create_model({entry!r}, {listed}checkpoint_path={str(out)!r}, pretrained_cfg_overlay={prepared!r})"
    )
    return state, _timm_metadata(recipe), left_out + how_to_load


def _timm_folder(recipe: Recipe, weights: State, out: Path) -> tuple[State, dict[str, str], str]:
    """Write config.json too."""
    state, left_out = _encoder(weights)
    config = for_timm.config(recipe, *_timm_arguments(recipe), _classes(recipe))
    for_timm.write(config, out)
    unnamed = "" if "label_names" in config or recipe.task.name != "classify" else for_timm.UNNAMED
    how_to_load = f"timm.create_model({f'local-dir:{out}'!r}, pretrained=True)"
    return state, _timm_metadata(recipe), left_out + unnamed + how_to_load


def _timm_arguments(recipe: Recipe) -> tuple[str, dict[str, Any]]:
    entry, arguments = timm_arguments(recipe.model.name, num_classes=_classes(recipe), **_settings(recipe))
    return entry, {key: value for key, value in arguments.items() if value is not None}


def _timm_metadata(recipe: Recipe) -> dict[str, str]:
    entry, arguments = _timm_arguments(recipe)
    prepared = json.dumps(for_timm.preparation(recipe, _classes(recipe)))
    return {
        "architecture": entry, "model_args": json.dumps(arguments, default=repr), "pretrained_cfg": prepared
    }  # fmt: skip


def _code(value: Any) -> str:
    """Return Python code for an argument; a class is one of timm's, such as the kind of block."""
    return f"{value.__module__}.{value.__qualname__}" if isinstance(value, type) else repr(value)


def _dsmim(recipe: Recipe, weights: State, out: Path) -> tuple[State, dict[str, str], str]:
    arguments = {"name": recipe.model.name, "num_classes": _classes(recipe), **_settings(recipe)}
    metadata = {"architecture": recipe.model.name, "model_args": json.dumps(arguments)}
    return weights, metadata, f"dsmim train RECIPE model.weights={out}"


def _authors(recipe: Recipe, weights: State, out: Path) -> tuple[State, dict[str, str], str]:
    name, left_out = recipe.model.name, ""
    if name.startswith(PREFIX):
        raise ValueError(f"{name}: there is no authors' layout for networks of timm; use --to timm")
    model = create_model(name, device="meta", **_settings(recipe))
    if isinstance(model, SwinTransformerV2):
        state = swin_as_authors(model, weights, simmim=recipe.task.name == "simmim")
    else:
        weights, left_out = _encoder(weights, "facebookresearch/deit")
        state = _renamed(weights, layouts.to_deit)
    how_to_load = f"torch.load({str(out)!r}, weights_only=True)['model']"
    if out.suffix == ".safetensors":
        how_to_load = f"safetensors.torch.load_file({str(out)!r})"
    return state, {"architecture": name}, f"{left_out}{how_to_load}"


def swin_as_authors(model: SwinTransformerV2, weights: State, simmim: bool) -> State:
    """Return the weights of the network, or of SimMIM around it, with the authors' names and buffers."""
    buffers = {f"{'encoder.' * simmim}{name}": buffer for name, buffer in _buffers(model).items()}
    if simmim:  # in the authors' files the mask token belongs to the encoder
        weights = {"encoder." * (name == "mask_token") + name: tensor for name, tensor in weights.items()}
    return _renamed(weights | buffers, lambda name: layouts.to_swin_authors(name, simmim))


def _renamed(state: State, rename: Callable[[str], str]) -> State:
    renamed = {rename(name): tensor for name, tensor in state.items()}
    assert len(renamed) == len(state), "two tensors got the same name"
    return renamed


def _buffers(model: SwinTransformerV2) -> State:
    """Return the buffers in the authors' files: per block two of its attention, and the mask of a shifted block."""
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
    """Return the network without what masked image modelling adds, and a line that lists what is left out."""
    if "mask_token" not in weights:
        return weights, ""
    prefix = "encoder."
    kept = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    dropped = ", ".join(key for key in weights if not key.startswith(prefix))
    return kept, f"# left out ({whose} has no place for it): {dropped}\n"


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Return the settings of recipe.model that shape the network, without those that are not set."""
    found = recipe.model.model_dump(include=set(_SETTINGS))
    return {key: value for key, value in found.items() if value}


def _learned(recipe: Recipe) -> dict[str, Any]:
    """Return the part of a recipe that is stored with the weights, for dsmim.load: network, task, image preparation,
    training; not where files are."""
    kept = dict.fromkeys(("name", "seed", "task", "model", "batch", "optim", "schedule"), True)
    return recipe.model_dump(
        mode="json", include=kept | {"data": {"augment", "mean", "std"}}, exclude={"model": {"weights", "weights_head"}}
    )


def _classes(recipe: Recipe) -> int:
    return recipe.task.num_classes if recipe.task.name == "classify" else 0


def _save(state: State, metadata: dict[str, str], out: Path, bare: bool) -> None:
    """Write the file, whole or not at all. bare: a .pth has only the weights, as the authors' files, no metadata."""
    out.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out.parent)
    state = {key: value.contiguous() for key, value in state.items()}
    with partial_file(out) as partial:
        mode = partial.stat().st_mode
        if out.suffix == ".safetensors":
            save_file(state, str(partial), metadata=metadata)
            partial.chmod(mode)  # safetensors makes files that only their owner may read, whatever the umask says
        else:
            with partial.open("wb") as file:  # given the path, torch would write its random name into the file
                torch.save({"model": state} if bare else {"model": state, "metadata": metadata}, file)
        partial.replace(out)
