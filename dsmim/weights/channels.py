"""Adapt weights that were trained on images with another number of channels."""

from __future__ import annotations

from timm.models import adapt_input_conv
from torch import nn

from dsmim.weights.layouts import Native

SETTING = "model.in_chans"
_DECODER = ("decoder.0.weight", "decoder.0.bias")


def first_convolutions(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules that read the image: dsmim's patch embedding, or what timm names `first_conv`."""
    named = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv") or "patch_embed.proj"
    return (named,) if isinstance(named, str) else tuple(named)


def adapt(native: Native, model: nn.Module, shapes: dict, source: str) -> dict[str, str]:
    """Adapt the first convolution to the model's channels, in place. Return what was done, by name.

    The rule is timm's (adapt_input_conv): one channel gets the sum of the three, n channels repeat them, scaled by 3/n.
    So a grey image, or one whose channels repeat, gives the features that its RGB form gave. SimMIM's decoder predicts
    the file's channels; it is dropped, with that reason, and starts fresh. Raises ValueError for a file of neither 3
    nor the model's channels.
    """
    names = [f"{module}.weight" for module in first_convolutions(model)]
    changed = {}
    for name in [name for name in names if _differ(native, shapes, name)]:
        theirs, own = native.tensors[name].shape[1], shapes[name][1]
        if theirs != 3:
            raise ValueError(
                f"{source}: {native.origin[name]} takes {theirs} channels, the model {own}; there is a rule from 3 "
                f"channels only. Set {SETTING}={theirs}"
            )
        native.tensors[name] = adapt_input_conv(own, native.tensors[name].clone())
        changed[name] = f"3 channels → {own} (timm's rule: {'their sum' if own == 1 else f'repeated, times 3/{own}'})"
        _drop_decoder(native, shapes, own)
    return changed


def _differ(native: Native, shapes: dict, name: str) -> bool:
    """Return whether file and model have this convolution with equal kernels, and only another number of channels."""
    theirs, own = native.tensors.get(name), shapes.get(name)
    if theirs is None or own is None or theirs.ndim != 4 or len(own) != 4:
        return False  # the check of shapes reports it
    return theirs.shape[1] != own[1] and (theirs.shape[0], *theirs.shape[2:]) == (own[0], *own[2:])


def _drop_decoder(native: Native, shapes: dict, channels: int) -> None:
    """Drop SimMIM's decoder if it has 3 × stride² outputs where the model has channels × stride²."""
    for name in _DECODER:
        if name in native.tensors and name in shapes and len(native.tensors[name]) * channels == shapes[name][0] * 3:
            native.drop(name, f"predicts 3 channels, the model {channels}")
