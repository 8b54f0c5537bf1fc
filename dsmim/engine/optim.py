"""Parameter groups and the optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from dsmim.recipe import Optim


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning-rate scale and a weight decay."""

    scale: float
    weight_decay: float
    names: tuple[str, ...]


def parameter_groups(model: nn.Module, layers: dict[str, int], optim: Optim) -> list[Group]:
    """One group per (scale, weight decay), deepest layers last. Frozen parameters are left out.

    layers: parameter name → layer id; scale = layer_decay ** (highest id - id), as microsoft/SimMIM and BEiT.
    Biases and other 1-D tensors have no weight decay, nor have names that match optim.no_decay.
    To be called before ZeRO-3 partitions the parameters: afterwards every tensor looks one-dimensional.
    """
    top = max(layers.values())
    members: dict[tuple[float, float], list[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim <= 1 or any(fnmatchcase(name, pattern) for pattern in optim.no_decay)
            scale = optim.layer_decay ** (top - layers[name])
            members.setdefault((scale, 0.0 if plain else optim.weight_decay), []).append(name)
    return [Group(scale, decay, tuple(names)) for (scale, decay), names in sorted(members.items())]


def build_optimizer(model: nn.Module, groups: list[Group], optim: Optim) -> torch.optim.Optimizer:
    """torch's AdamW, fused: unfused, a step needs several copies of the largest shard. Its groups carry `lr_scale`; the
    rate itself is set before every step."""
    by_name = dict(model.named_parameters())
    return torch.optim.AdamW(
        [
            {"params": [by_name[n] for n in g.names], "lr_scale": g.scale, "weight_decay": g.weight_decay, "lr": 0.0}
            for g in groups
        ],
        betas=tuple(optim.betas),
        eps=optim.eps,
        fused=True,
    )
