"""Parameter groups and the optimizer."""

from __future__ import annotations

import difflib
import inspect
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info
from torch import nn

from dsmim.engine.ds_config import zero_stage
from dsmim.engine.lamb import Lamb
from dsmim.log import some
from dsmim.models import named_without_decay
from dsmim.recipe import Optim
from dsmim.recipe.optimizers import TIMM_PREFIX, refusal


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


def check_patterns(model: nn.Module, optim: Optim) -> None:
    """Check optim.no_decay for misspelt names: the parameters meant would be decayed.

    A pattern may be that of no parameter, as published lists for several networks have them; but not if a parameter has
    nearly that name. Raises ValueError then.
    """
    names = [name for name, _ in model.named_parameters()]
    last = sorted({name.rpartition(".")[2] for name in names})
    for pattern in optim.no_decay:
        if not any(fnmatchcase(name, pattern) for name in names) and (
            near := difflib.get_close_matches(pattern.strip("*"), last, n=1, cutoff=0.8)
        ):
            raise ValueError(
                f"optim.no_decay: {pattern!r} is the name of no parameter of this network; did you mean {near[0]}?"
            )


def build_optimizer(model: nn.Module, groups: list[ParameterGroup], optim: Optim, peak: float) -> torch.optim.Optimizer:
    """Return the recipe's optimizer. Each of its groups has the key `lr_scale`; the engine sets the learning rate
    before every step.

    peak: the learning rate after optim.lr_scaling. AdamW is torch's, fused: unfused, a step needs memory for several
    copies of the largest shard. Raises ValueError for optim.options that a timm optimizer does not take.
    """
    by_name = dict(model.named_parameters())
    settings = [
        {"params": [by_name[n] for n in g.names], "lr_scale": g.scale, "weight_decay": g.weight_decay, "lr": 0.0}
        for g in groups
    ]
    if optim.name == "adamw":
        return torch.optim.AdamW(settings, betas=optim.betas, eps=optim.eps, fused=True)
    if optim.name == "lamb":
        return Lamb(settings, lr=peak, betas=optim.betas, eps=optim.eps)
    for group in settings:  # "corrected" weight decay needs each group's own peak
        group["max_lr_snapshot"] = peak * group["lr_scale"]
    given = {key: value for key in ("betas", "eps") if (value := getattr(optim, key)) is not None}
    name, options = optim.name.removeprefix(TIMM_PREFIX), {key: _as_tuple(v) for key, v in optim.options.items()}
    try:
        return create_optimizer_v2(settings, name, lr=peak, weight_decay=optim.weight_decay, **given, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"optim.options: {optim.name} does not take {optim.options}: {error}") from None


def check_optimizer(optim: Optim, config: dict[str, Any]) -> None:
    """Check that the optimizer computes under this DeepSpeed configuration what it computes without ZeRO.

    Raises ValueError that names the key, and what was measured.
    """
    stage = zero_stage(config)
    offload = config.get("zero_optimization", {}).get("offload_optimizer") or {}
    if optim.name != "adamw" and offload.get("device") == "nvme":
        raise ValueError(
            f"zero_optimization.offload_optimizer.device: nvme is for optim.name=adamw only, not for {optim.name}; set "
            "it to cpu or none"
        )
    if optim.name.startswith(TIMM_PREFIX):
        name = optim.name.removeprefix(TIMM_PREFIX)
        _check_options(name, optim)
        if problem := refusal(name, stage, optim.options):
            raise ValueError(problem)


def _check_options(name: str, optim: Optim) -> None:
    """Check that the optimizer takes optim.options, and keeps a state where a moving average needs one."""
    kind = get_optimizer_info(name).opt_class
    takes = [key for key in inspect.signature(kind.__init__).parameters if key not in ("self", "params")]
    if unknown := [key for key in optim.options if key not in takes]:
        near = difflib.get_close_matches(unknown[0], takes, n=1)
        meant = f"did you mean {near[0]}?" if near else f"it takes {', '.join(takes)}"
        raise ValueError(f"optim.options.{unknown[0]}: {optim.name} has no such argument; {meant}")
    if optim.ema_decay is not None and kind is torch.optim.SGD and optim.options.get("momentum", 0.9) == 0:
        raise ValueError(
            f"optim.ema_decay: {optim.name} without momentum has no state, where the moving average would be kept; set "
            "optim.options.momentum above 0, or optim.ema_decay=null"
        )


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
