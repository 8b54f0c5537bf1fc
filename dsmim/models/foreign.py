"""Any network of timm, named `timm:NAME`, for fine-tuning. Weights of MAE, BEiT and many others fit into these."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import timm
from timm.models import get_arch_pretrained_cfgs, group_parameters
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from dsmim.models.stochastic_depth import depth_rates, multiply_by_position

PREFIX = "timm:"
_SOURCES = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")
_OWNED = {
    "img_size": "model.img_size; images are square",
    "in_chans": "model.in_chans",
    "num_classes": "task.num_classes",
    "drop_path_rate": "model.drop_path_rate",
    "head_init_scale": "model.head_init_std, a deviation",
    "model_name": "model.name",
    **dict.fromkeys(_SOURCES, "model.weights to a file; nothing is downloaded"),
}
"""Arguments of timm that are not options → the recipe's key."""
SWIN = (SwinTransformer, SwinTransformerV2)
VIT = (VisionTransformer, Beit)
"""Families whose layers are numbered as their authors do (see registry.layer_ids)."""


def build(
    name: str,
    num_classes: int = 0,
    drop_path_rate: float = 0.0,
    img_size: int | None = None,
    in_chans: int = 3,
    options: dict[str, Any] | None = None,
    drop_path_rates: str = "linear",
) -> nn.Module:
    """Return timm's network, initialised by timm in host memory. Its drop path can be drawn by position.

    img_size is passed to networks that are built for one size (transformers); others take any image. options: further
    arguments of timm.create_model. drop_path_rates: "linear", as timm sets them (growing from block to block, or from
    stage to stage); "uniform", equal in all blocks. Raises ValueError for a name, a tag or an option that timm does not
    take, and for an option that a key of the recipe sets.
    """
    entry = _known(name)
    _check_options(options or {})
    options = {"num_classes": num_classes, **(options or {})}
    if in_chans != 3:  # timm's default
        options["in_chans"] = in_chans
    if drop_path_rate:  # many networks do not take it
        options["drop_path_rate"] = drop_path_rate
    if _built_for_one_size(entry):
        options["img_size"] = img_size
    first = depth_rates(drop_path_rates, drop_path_rate, 1)[0]  # of a linear growth it is 0
    try:
        model = timm.create_model(entry, pretrained=False, **options)
    except (TypeError, AssertionError, ValueError, RuntimeError, LookupError, ArithmeticError, AttributeError) as error:
        reason = f"{error}" or type(error).__name__
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise ValueError(f"model.name: timm's {entry} does not take these settings: {given} ({reason})") from error
    multiply_by_position(model, uniform=first or None)
    return model


def _known(name: str) -> str:
    """Return timm's name of the network. Raises ValueError, with what is near, for a name or a tag that timm lacks."""
    entry = name.removeprefix(PREFIX)
    if not timm.is_model(entry):
        close = difflib.get_close_matches(entry, timm.list_models(), n=1)
        hint = f"; did you mean {PREFIX}{close[0]}?" if close else ""
        raise ValueError(f"model.name: timm has no model {entry!r}{hint}")
    architecture, _, tag = entry.partition(".")
    tags = [full.partition(".")[2] for full in get_arch_pretrained_cfgs(architecture)]
    if tag and tag not in tags:
        known = ", ".join(filter(None, tags)) or "none"
        raise ValueError(f"model.name: timm has no tag {tag!r} of {architecture}; its tags: {known}")
    return entry


def _check_options(options: Mapping[str, Any]) -> None:
    """Refuse what a key of the recipe sets: two owners would not agree."""
    owned = [f"{key} (set {_OWNED[key]})" for key in options if key in _OWNED]
    if owned:
        raise ValueError(f"model.options: not {', '.join(owned)}")


def timm_arguments(name: str, options: dict[str, Any] | None = None, **settings) -> tuple[str, dict]:
    """Return (entry point, arguments) of the network that `build` returns for these settings."""
    entry = _known(name)
    if not _built_for_one_size(entry):
        settings.pop("img_size", None)
    return entry, settings | (options or {})


def _built_for_one_size(entry: str) -> bool:
    """Return whether timm's network takes img_size. Those with a patch embedding or windows of fixed size do."""
    return timm.get_pretrained_cfg(entry, allow_unregistered=True).fixed_input_size


def named_without_decay(model: nn.Module) -> set[str]:
    """Return the names, or patterns of names, that a network of timm wants to have no weight decay; of any other
    network none."""
    of_timm = type(model).__module__.partition(".")[0] == "timm"
    return set(model.no_weight_decay()) if of_timm and hasattr(model, "no_weight_decay") else set()


def layer_ids(model: nn.Module) -> dict[str, int]:
    """Return parameter name → layer id, by timm's own grouping (`group_matcher`); the highest is the head.

    Raises ValueError for a network without a grouping.
    """
    if not hasattr(model, "group_matcher"):
        raise ValueError(f"model.name: timm gives no layer numbers for this network ({type(model).__name__})")
    return group_parameters(model, model.group_matcher(coarse=False), reverse=True)
