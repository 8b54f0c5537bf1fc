"""Any network of timm, by `timm:NAME`, for fine-tuning: MAE's, BEiT's and many more pre-trained weights fit into it."""

from __future__ import annotations

import difflib

import timm
from timm.models import group_parameters
from torch import nn

PREFIX = "timm:"


def build(name: str, num_classes: int = 0, drop_path_rate: float = 0.0, img_size: int | None = None) -> nn.Module:
    """timm's network, initialised by timm in host memory. Raises ValueError for a name or an option timm does not take.

    img_size goes to networks that are built for one size (transformers); to others any image may be given.
    """
    entry = name.removeprefix(PREFIX)
    if not timm.is_model(entry):
        close = difflib.get_close_matches(entry, timm.list_models(), n=1)
        hint = f"; did you mean {PREFIX}{close[0]}?" if close else ""
        raise ValueError(f"model.name: timm has no model {entry!r}{hint}")
    options = {"num_classes": num_classes, "drop_path_rate": drop_path_rate}
    try:
        return timm.create_model(entry, pretrained=False, img_size=img_size, **options)
    except TypeError as error:
        if "img_size" not in str(error):
            raise ValueError(f"model.name: timm's {entry} does not take these settings ({error})") from None
    return timm.create_model(entry, pretrained=False, **options)


def layer_ids(model: nn.Module) -> dict[str, int]:
    """Parameter name → layer id, by timm's own grouping (`group_matcher`); the highest is the head."""
    return group_parameters(model, model.group_matcher(coarse=False), reverse=True)
