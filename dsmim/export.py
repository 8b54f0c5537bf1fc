"""`dsmim export`: a checkpoint's weights for tools that know nothing of DeepSpeed."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from dsmim.engine import checkpoint
from dsmim.models import timm_arguments
from dsmim.models.weights import encoder_of
from dsmim.recipe import Recipe


def export_timm(path: Path, out: Path) -> str:
    """Write the network with timm's key names as fp32 safetensors. Gives the Python that loads it with plain timm.

    Of a masked-image-modelling checkpoint the encoder is written; mask token and decoder have no place in timm.
    Raises ValueError when path is no checkpoint.
    """
    found = checkpoint.locate(path)
    recipe = Recipe.model_validate(checkpoint.read_state(found)["recipe"])
    state, dropped = encoder_of(checkpoint.checkpoint_weights(found))
    classes = recipe.task.num_classes if recipe.task.name == "classify" else 0
    entry, arguments = timm_arguments(
        recipe.model.name,
        img_size=recipe.model.img_size,
        window_size=recipe.model.window_size,
        num_classes=classes,
        pretrained_window_sizes=recipe.model.pretrained_window_sizes,
    )
    metadata = {"format": "pt", "architecture": entry, "model_args": json.dumps(arguments), "source": recipe.name}
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in state.items()}, str(out), metadata=metadata)
    listed = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    left = f"# left out (no place in timm): {', '.join(dropped)}\n" if dropped else ""
    return f"{left}timm.create_model({entry!r}, {listed}, checkpoint_path={str(out)!r})"
