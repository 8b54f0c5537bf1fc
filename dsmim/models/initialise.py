"""First weights, module by module, so that a model can be built whole or in parts (see build.py) with equal numbers.

A model's own modules say how they start in `initialise()`; the rest is common to both papers' public code: truncated
normal with deviation 0.02 for every linear layer, biases 0, torch's defaults for convolutions and norms
(microsoft/Swin-Transformer and facebookresearch/deit, `_init_weights`).
"""

from __future__ import annotations

from timm.layers import LayerScale, trunc_normal_
from torch import nn

DEVIATION = 0.02


def initialise(module: nn.Module) -> None:
    """Give a module's own parameters, not its children's, their first values."""
    if hasattr(module, "initialise"):
        module.initialise()
    elif isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=DEVIATION)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, LayerScale):
        nn.init.constant_(module.gamma, module.init_values)
    else:
        module.reset_parameters()
