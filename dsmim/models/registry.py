"""Create models by name."""

from __future__ import annotations

import difflib
import warnings

import torch
from timm.layers import to_2tuple
from torch import nn

from dsmim.models import foreign, swin_sizes, vit
from dsmim.models.blocks import Recompute
from dsmim.models.build import materialised
from dsmim.models.initialise import initialise_head
from dsmim.models.swin_v2 import SwinTransformerV2

# Options that only Swin V2 takes
_ONLY_SWIN = ("window_size", "pretrained_window_sizes", "extra_norm_every", "sequential_stages")
OPTIONS = (
    "img_size", "in_chans", "num_classes", "drop_path_rate", "drop_path_rates", "head_init_std", *_ONLY_SWIN, "options",
)  # fmt: skip


def model_names() -> list[str]:
    """Return the names of dsmim's own networks; create_model also takes `timm:NAME` for any network of timm."""
    return [*swin_sizes.SIZES, *vit.SIZES]


def create_model(name: str, device: str | None = None, **options) -> nn.Module:
    """Build a network with fresh fp32 weights in host memory, or without weights on device "meta" (see build.py).

    Options: img_size (pixels), in_chans (channels of the images, 3), num_classes (0: no head, the forward returns
    pooled features), drop_path_rate, drop_path_rates ("uniform": all blocks have that rate; "linear": it grows from 0;
    by default uniform for DeiT III), head_init_std (deviation of the head's first weights). Swin V2 also takes
    window_size (tokens), pretrained_window_sizes (one per stage, 0: the window itself), extra_norm_every and
    sequential_stages (see SwinTransformerV2); timm:NAME also takes options (a dict, see foreign.py). None means not
    given. device: None is "meta" within `with torch.device("meta")`, else "cpu". timm's networks ignore it: timm builds
    and initialises them, on the context's device or in host memory.
    Raises ValueError for an unknown name or option, with the nearest known one, and for options that the network does
    not take. Warns of an image size of which the patches leave out a border.
    """
    assert device in (None, "cpu", "meta"), device
    options = _known({key: value for key, value in options.items() if value is not None})
    head = options.pop("head_init_std", None)
    if name.startswith(foreign.PREFIX):
        return _finished(foreign.build(name, **_without_windows(name, options)), name, head)
    family = _family(name)
    options = _without_timm_options(name, options)
    if family is not swin_sizes:
        options = _without_windows(name, options)
    device = device or ("meta" if torch.get_default_device().type == "meta" else "cpu")
    with torch.device("meta"):
        model = _finished(family.build(name, **options), name, head)
    with torch.device("cpu"):
        return materialised(model) if device == "cpu" else model


def layer_ids(model: nn.Module) -> dict[str, int]:
    """Return parameter name → layer id, for layer-wise learning-rate decay: patch embedding 0, head highest.

    Families whose authors fine-tune with layer decay count as these do, in timm's networks too: Swin as
    microsoft/SimMIM; ViT and BEiT as unilm/beit, facebookresearch/mae and microsoft/SimMIM. There the final norm is as
    high as the head; timm counts it with the last block. Other networks count as timm does. Raises ValueError for a
    network whose layers timm does not number.
    """
    if isinstance(model, (SwinTransformerV2, *foreign.SWIN)):
        return swin_sizes.layer_ids(model)
    return vit.layer_ids(model) if isinstance(model, foreign.VIT) else foreign.layer_ids(model)


def classifier(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules that turn features into logits."""
    if isinstance(model, SwinTransformerV2):
        return ("head.fc",)
    name = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "head"
    return (name,) if isinstance(name, str) else tuple(name)


def set_recompute(model: nn.Module, recompute: Recompute) -> None:
    """Choose the blocks to recompute. Raises ValueError for a choice that a network of timm does not support."""
    if hasattr(model, "set_recompute"):
        return model.set_recompute(recompute)
    if recompute.every > 1 or recompute.stages is not None:
        raise ValueError("model.grad_checkpointing: a network of timm recomputes every block (1) or none (0)")
    if recompute.every:
        model.set_grad_checkpointing(True)


def timm_arguments(name: str, **options) -> tuple[str, dict]:
    """Return (entry point, keyword arguments) with which `timm.create_model` builds the same network.

    Raises ValueError when timm has no such network.
    """
    options = _known({key: value for key, value in options.items() if (key, value) != ("in_chans", 3)})
    for only_ours in ("head_init_std", "drop_path_rates"):
        options.pop(only_ours, None)
    if name.startswith(foreign.PREFIX):
        return foreign.timm_arguments(name, **_without_windows(name, options))
    family = _family(name)
    options = _without_timm_options(name, options)
    return family.timm_arguments(name, **(options if family is swin_sizes else _without_windows(name, options)))


def _family(name: str):
    for family in (swin_sizes, vit):
        if name in family.SIZES:
            return family
    close = difflib.get_close_matches(name, model_names(), n=1)
    hint = f"; did you mean {close[0]}?" if close else "."
    raise ValueError(f"model.name: no model {name!r}{hint} Known: {', '.join(model_names())}, timm:NAME")


def _known(options: dict) -> dict:
    unknown = [key for key in options if key not in OPTIONS]
    if unknown:
        close = difflib.get_close_matches(unknown[0], OPTIONS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(
            f"create_model has no option {', '.join(unknown)}; {hint}Options: {', '.join(OPTIONS)}. Further arguments "
            f"of timm.create_model, for {foreign.PREFIX}NAME only, are given as options={{{unknown[0]!r}: …}}"
        )
    return options


def _finished(model: nn.Module, name: str, head_deviation: float | None) -> nn.Module:
    _check_border(model, name)
    if head_deviation is not None:
        heads = [model.get_submodule(module) for module in classifier(model)]
        if not all(isinstance(getattr(head, "weight", None), nn.Parameter) for head in heads):
            raise ValueError(f"model.head_init_std: {name} has no classifier here; leave it out")
        initialise_head(heads, head_deviation)
    return model


def _check_border(model: nn.Module, name: str) -> None:
    """Warn where the patches do not cover the image: their convolution ignores the rest. Refuse less than a patch."""
    embed = getattr(model, "patch_embed", None)
    if not (getattr(embed, "img_size", None) and getattr(embed, "patch_size", None)):
        return
    side, patch = min(to_2tuple(embed.img_size)), max(to_2tuple(embed.patch_size))
    if side < patch:
        raise ValueError(f"model.img_size: {side} is less than a patch of {name} ({patch} pixels)")
    if side % patch:
        warnings.warn(
            f"model.img_size: {side} pixels are not a multiple of the patch of {name} ({patch}): the last "
            f"{side % patch} rows and columns of every image are ignored. {side - side % patch} pixels have no "
            "such rest",
            stacklevel=4,
        )


def _without_timm_options(name: str, options: dict) -> dict:
    if options.get("options"):
        raise ValueError(f"model.options: {name} is not a network of timm; only {foreign.PREFIX}NAME takes options")
    return {key: value for key, value in options.items() if key != "options"}


def _without_windows(name: str, options: dict) -> dict:
    given = [key for key in _ONLY_SWIN if options.get(key)]
    if given:
        raise ValueError(f"model.{given[0]}: {name} has no windows; only Swin V2 (swinv2_…) takes it")
    return {key: value for key, value in options.items() if key not in _ONLY_SWIN}
