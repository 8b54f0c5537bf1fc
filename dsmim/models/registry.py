"""Models by name."""

from __future__ import annotations

import difflib

from torch import nn

from dsmim.models import swin_v2


def model_names() -> list[str]:
    """Every name that create_model takes."""
    return list(swin_v2.SIZES)


def create_model(name: str, **options) -> nn.Module:
    """Build a network with fresh weights, on the CPU, in fp32.

    Options: img_size (pixels), window_size (tokens), num_classes (0: no head, the forward gives pooled features),
    drop_path_rate, pretrained_window_sizes (one per stage, 0: the window itself).
    Raises ValueError for an unknown name, with the nearest known one.
    """
    if name not in swin_v2.SIZES:
        close = difflib.get_close_matches(name, model_names(), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"model.name: no model {name!r}{hint} Known: {', '.join(model_names())}")
    return swin_v2.build(name, **options)


def layer_ids(model: nn.Module) -> dict[str, int]:
    """Depth of every parameter for layer-wise learning-rate decay: 0 is the patch embedding, the highest the head."""
    return swin_v2.layer_ids(model)


def timm_arguments(name: str, **options) -> tuple[str, dict]:
    """(entry point, keyword arguments) with which `timm.create_model` builds the same network."""
    return swin_v2.timm_arguments(name, **options)
