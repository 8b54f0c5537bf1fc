"""Count the multiplications of a forward pass on the network itself, without memory."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@torch.no_grad()
def forward_macs(model: nn.Module, img_size: int) -> int:
    """Return the multiply-accumulates of one image in a network of dsmim on the meta device.

    Matrix products and convolutions count. The papers call these "FLOPs" (a multiplication and its addition count
    once). What all images of a batch share, such as Swin V2's position-bias MLP, is left out, as in the authors'
    `flops()`: the result is the cost of a second image.
    """
    assert all(parameter.is_meta for parameter in model.parameters()), "count on the meta device only"
    one, two = (
        _flops(model.eval(), torch.empty(size, model.in_chans, img_size, img_size, device="meta")) for size in (1, 2)
    )
    return (two - one) // 2


def _flops(model: nn.Module, images: torch.Tensor) -> int:
    model.to("meta")  # the buffers too
    with FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops()
