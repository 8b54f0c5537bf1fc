"""What timm must know beside the weights, so that its own create_transform prepares images as `dsmim evaluate` does.

timm reads nothing from a weight file's metadata. It takes this from `pretrained_cfg_overlay=`, and from the config.json
of a folder, `timm.create_model("local-dir:FOLDER", pretrained=True)`, the layout of models on the Hugging Face Hub.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm

from dsmim.data.class_names import class_names
from dsmim.data.normalisation import normalisation
from dsmim.recipe import Recipe
from dsmim.shards.atomic import write_atomically

CONFIG, WEIGHTS = "config.json", "model.safetensors"
"""timm's names of the two files of a folder."""
UNNAMED = "# no label_names: there is no classes.json for these classes beside data.train\n"
_OF_THE_NETWORK = ("fixed_input_size", "first_conv", "classifier")


def preparation(recipe: Recipe, classes: int) -> dict[str, Any]:
    """Return the entries of timm's pretrained_cfg that say how images are prepared, and the number of classes."""
    size, augment, pixels = recipe.model.img_size, recipe.data.augment, normalisation(recipe)
    return {
        "input_size": (pixels.channels, size, size),
        "interpolation": augment.eval_interpolation,
        "crop_pct": augment.eval_crop_ratio,
        "crop_mode": "center",
        "mean": pixels.mean,
        "std": pixels.std,
        "num_classes": classes,
    }


def config(recipe: Recipe, entry: str, arguments: dict[str, Any], classes: int) -> dict[str, Any]:
    """Return the content of config.json for the network that timm.create_model(entry, **arguments) builds.

    Raises ValueError for arguments that JSON cannot hold.
    """
    odd = [key for key, value in arguments.items() if isinstance(value, type)]
    if odd:
        raise ValueError(
            f"{recipe.model.name}: a folder for timm cannot hold its argument {odd[0]}; export a .safetensors file and "
            "use the line that is printed"
        )
    network = timm.get_pretrained_cfg(entry, allow_unregistered=True).to_dict()
    kept = {key: network[key] for key in _OF_THE_NETWORK if key in network}
    names = label_names(recipe)
    return {
        "architecture": entry.partition(".")[0],
        "num_classes": classes,
        "model_args": arguments,
        "pretrained_cfg": kept | preparation(recipe, classes),
    } | ({"label_names": names} if names else {})


def write(content: dict[str, Any], folder: Path) -> None:
    """Write config.json, whole or not at all; create the folder if it is missing."""
    write_atomically(folder / CONFIG, (json.dumps(content, indent=2) + "\n").encode())


def label_names(recipe: Recipe) -> list[str]:
    """Return the names of the classes, as class_names finds them; an empty list if there are none for as many classes,
    or lists that differ."""
    if recipe.task.name != "classify":
        return []
    try:
        return class_names(recipe.data, recipe.task.num_classes)
    except ValueError:
        return []
