"""Set first weights, module by module, so that a model built whole and one built in parts (build.py) are equal.

Modules written here define their first values in `initialise()`. The rest is the same in both papers' public code:
truncated normal with deviation 0.02 for every linear layer, 0 for biases, torch's defaults for convolutions and norms
(microsoft/Swin-Transformer and facebookresearch/deit, `_init_weights`).
"""

from __future__ import annotations

from collections.abc import Iterable

from timm.layers import LayerScale, trunc_normal_
from torch import nn

DEVIATION = 0.02
MAE_HEAD = 2e-5  # facebookresearch/mae main_finetune.py; BEiT's 0.02 × init_scale 0.001 is the same


def initialise_head(heads: Iterable[nn.Module], deviation: float) -> None:
    """Set the first weights of classifiers: truncated normal with this deviation, biases 0.

    On the meta device the deviation is kept for `initialise`.
    """
    for head in heads:
        head.init_deviation = deviation
        if not head.weight.is_meta:
            trunc_normal_(head.weight, std=deviation)
            if head.bias is not None:
                nn.init.zeros_(head.bias)


def initialise(module: nn.Module) -> None:
    """Set the first values of a module's own parameters, not of its children's."""
    if hasattr(module, "initialise"):
        module.initialise()
    elif isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=getattr(module, "init_deviation", DEVIATION))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, LayerScale):
        nn.init.constant_(module.gamma, module.init_values)
    else:
        module.reset_parameters()
