"""Networks come into being in two moves: their shape, without memory, then their weights, module by module.

    model = create_model(…, device="meta")         # shapes, names and buffers; parameters take no memory
    for module in materialise(model, weights): …   # each module's parameters, filled when the caller is ready for them

In between lies what a billion parameters need: the caller can send a module's weights to a GPU, or cut them into
ZeRO-3's shards, before the next module's exist. `zero.Init` cannot give that with right numbers: the initialisers of
timm's networks then write into tensors that it has emptied already, without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from dsmim.models.initialise import initialise


def materialise(model: nn.Module, weights: Mapping[str, torch.Tensor] | None = None) -> Iterator[nn.Module]:
    """Yield every module that has parameters of its own, in the model's order, once those lie filled in host memory.

    They are filled with NaN, initialised, and then overwritten by `weights` (full name of a parameter or saved buffer →
    tensor of its shape) where it has them. What is not on the meta device is left as it is, but for `weights`.
    AssertionError names a parameter that no initialiser wrote.
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
    """The model with all its parameters initialised in host memory."""
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
