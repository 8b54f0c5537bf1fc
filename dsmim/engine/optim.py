"""Parameter groups and the optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from dsmim.log import some
from dsmim.models import named_without_decay
from dsmim.recipe import Optim


@dataclass(frozen=True)
class ParameterGroup:
    """Names of parameters that share a learning-rate scale and a weight decay."""

    scale: float
    weight_decay: float
    names: tuple[str, ...]


def parameter_groups(model: nn.Module, layers: dict[str, int], optim: Optim) -> list[ParameterGroup]:
    """Return one group per (scale, weight decay), sorted by them: layers near the input first. Frozen parameters are
    left out.

    layers: parameter name → layer id; scale = layer_decay ** (highest id - id), as in microsoft/SimMIM and BEiT.
    Biases, other 1-D tensors and names that match optim.no_decay have no weight decay; with optim.model_no_decay nor
    has what a network of timm names itself.
    To be called before ZeRO-3 partitions the parameters: afterwards every tensor looks one-dimensional.
    Raises ValueError for parameters of shape (), which DeepSpeed does not take; (1,) is fine.
    """
    scalars = [name for name, parameter in model.named_parameters() if parameter.requires_grad and not parameter.ndim]
    if scalars:
        raise ValueError(
            "model.name: DeepSpeed cannot train a network with parameters of shape (): "
            f"{some(scalars, len(scalars), 5)}. Take another network, or one of which these have shape (1,)"
        )
    top, patterns = max(layers.values()), _no_decay(model, optim)
    members: dict[tuple[float, float], list[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim <= 1 or name.endswith(".bias")
            no_decay = plain or any(fnmatchcase(name, pattern) for pattern in patterns)
            scale = optim.layer_decay ** (top - layers[name])
            members.setdefault((scale, 0.0 if no_decay else optim.weight_decay), []).append(name)
    return [ParameterGroup(scale, decay, tuple(names)) for (scale, decay), names in sorted(members.items())]


def _no_decay(model: nn.Module, optim: Optim) -> list[str]:
    """Return the patterns of names without weight decay: the recipe's, and what a network of timm names itself. Those
    are patterns too, of Python's fnmatch (_matches_pattern in timm/optim/_param_groups.py)."""
    return [*optim.no_decay, *(named_without_decay(model) if optim.model_no_decay else ())]


def build_optimizer(model: nn.Module, groups: list[ParameterGroup], optim: Optim) -> torch.optim.Optimizer:
    """Return torch's AdamW, fused: unfused, a step needs memory for several copies of the largest shard.

    Each group has the key `lr_scale`; the engine sets the learning rate before every step.
    """
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
