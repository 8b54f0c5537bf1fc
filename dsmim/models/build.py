"""Create networks in two steps: first their shape, without memory; then their weights, module by module.

    model = create_model(…, device="meta")         # shapes, names and buffers; parameters take no memory
    for module in materialise(model, weights): …   # the parameters of one module, filled when the caller asks for them

A billion parameters need this: the caller can send a module's weights to a GPU, or keep only its shard (ZeRO-3), before
the next module's weights exist. `zero.Init` around the constructor would give wrong numbers: the initialisers of timm's
networks would write into tensors that it has already emptied, without any error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from dsmim.models.initialise import initialise


def materialise(model: nn.Module, weights: Mapping[str, torch.Tensor] | None = None) -> Iterator[nn.Module]:
    """Yield every module that has its own parameters, in the model's order, after filling them in host memory.

    Parameters on the meta device are filled with NaN and initialised. Then `weights` (full name of a parameter or saved
    buffer → tensor of its shape) overwrites what it names, on the meta device or not. Nothing else is changed.
    Raises AssertionError, which names a parameter that no initialiser wrote.
    """
    weights = weights or {}
    for prefix, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        _fill(module, [name for name, parameter in own.items() if parameter.is_meta])
        for name in [*own, *dict(module.named_buffers(recurse=False))]:
            _overwrite(getattr(module, name), f"{prefix}.{name}".lstrip("."), weights)
        if own:
            yield module


def materialised(model: nn.Module) -> nn.Module:
    """Return the model after initialising all its parameters in host memory."""
    for _ in materialise(model):
        pass
    return model


def _fill(module: nn.Module, empty: list[str]) -> None:
    for name in empty:
        old = getattr(module, name)
        filled = torch.full(old.shape, float("nan"), dtype=old.dtype)
        setattr(module, name, nn.Parameter(filled, requires_grad=old.requires_grad))
    if empty:
        initialise(module)
        for name in empty:
            assert not getattr(module, name).isnan().any(), f"{type(module).__name__}.{name} is not initialised"


@torch.no_grad()
def _overwrite(tensor: torch.Tensor, name: str, weights: Mapping[str, torch.Tensor]) -> None:
    if name in weights:
        assert tensor.shape == weights[name].shape, name
        tensor.copy_(weights[name])
