"""Match foreign weights to a model. Every key is used, dropped for a stated reason, or an error."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dsmim.models.initialise import MAE_HEAD
from dsmim.models.simmim import SimMIM
from dsmim.models.swin_v2 import SwinTransformerV2
from dsmim.weights import channels, heads, positions, swin_windows
from dsmim.weights.layouts import MIM_ONLY, Native, to_native
from dsmim.weights.swin_windows import Windows

State = dict[str, torch.Tensor]
_POOLED = "the model pools before its last norm (fc_norm)"


@dataclass(frozen=True)
class Weights:
    """What a file holds."""

    tensors: Mapping[str, torch.Tensor]
    """by the file's keys"""
    source: str
    """the file's name, for messages"""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """entries beside the weights → what they are"""
    windows: Windows | None = None
    """of Swin V2, if the file's settings contain them"""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """what the file says about itself"""


@dataclass
class LoadReport:
    """What happened to every key."""

    used: list[str] = field(default_factory=list)
    """keys of the file"""
    dropped: dict[str, str] = field(default_factory=dict)
    """key of the file → why it was not used"""
    fresh: list[str] = field(default_factory=list)
    """the model's tensors that keep their initialisation"""
    changed: dict[str, str] = field(default_factory=dict)
    """the model's tensors that differ from the file → what was done"""
    layout: str = ""
    """the project whose names the file's keys are"""
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        layout = f" ({self.layout})" if self.layout else ""
        dropped = [f"{count} dropped ({reason})" for reason, count in sorted(Counter(self.dropped.values()).items())]
        fresh = f"newly initialised: {', '.join(self.fresh)}" if self.fresh else "nothing newly initialised"
        return "; ".join([f"{len(self.used)} tensors used{layout}", *dropped, *self._changes(), fresh, *self.notes])

    def _changes(self) -> list[str]:
        texts = Counter(self.changed.values())
        first = {text: name for name, text in reversed(self.changed.items())}
        return [f"{first[t]}{f' and {n - 1} more' if n > 1 else ''}: {t}" for t, n in texts.items()]


def match(model: nn.Module, weights: Weights, head: str | None = None) -> tuple[LoadReport, State]:
    """Return a report, and the file's weights with the model's names and shapes.

    The model's parameters may be on the meta device; they are not changed. head: see heads.settle. The state maps full
    names of the model's parameters (and of the persistent buffers of a network of timm) to tensors of their shape.
    Raises ValueError when the model has no place for a key, or the file no weights for a tensor of the model. Only a
    head, what masked image modelling adds to an encoder, and the norm after mean pooling may start fresh.
    """
    network, source = model.encoder if isinstance(model, SimMIM) else model, weights.source
    own = model.state_dict()
    names = {name.removeprefix("encoder.") if network is not model else name: name for name in own}
    shapes = {name: own[full].shape for name, full in names.items()}
    native = to_native(weights.tensors, shapes, source)
    report = LoadReport(layout=native.layout)
    _check_swin(network, native, weights, report)
    report.changed |= heads.settle(head, native, network, shapes, source)
    _drop_without_place(native, shapes)
    report.changed |= channels.adapt(native, network, shapes, source)
    report.changed |= positions.adapt(native, network, source)
    report.fresh = sorted(names[name] for name in shapes if name not in native.tensors)
    _check_complete(native, shapes, _may_be_fresh(native, network, shapes), source)
    report.used = sorted(set(native.origin.values()))
    report.dropped = native.dropped | dict(weights.left_out)
    assert set(report.used) | set(native.dropped) == set(weights.tensors), "a key of the file was lost"
    head_of_mae = heads.fresh_as_mae(native, network, shapes)
    if head_of_mae:
        report.notes.append(f"the new head has deviation {MAE_HEAD}, as MAE's authors fine-tune (model.head_init_std)")
    tensors = native.tensors | head_of_mae
    return report, {names[name]: _full_precision(tensor) for name, tensor in tensors.items()}


def complete(model: nn.Module, state: Mapping[str, torch.Tensor], source: str) -> State:
    """Match a checkpoint of the same model. Raises ValueError when anything is missing or left over."""
    has_head = heads.head_names(model, model.state_dict())
    report, fitting = match(model, Weights(state, source), head="keep" if has_head else None)
    if report.fresh or report.dropped:
        raise ValueError(f"weights {source} are not those of this model: {report}")
    return fitting


def _check_swin(network: nn.Module, native: Native, weights: Weights, report: LoadReport) -> None:
    """Check what shapes alone do not show, or show badly: windows, heads, extra norms."""
    own = swin_windows.of_model(network)
    if own is None or "layers.0.blocks.0.attn.logit_scale" not in native.tensors:
        return
    ours = isinstance(network, SwinTransformerV2)
    setting = "model.pretrained_window_sizes" if ours else "the network's option pretrained_window_sizes"
    _check_heads(network, native, weights.source)
    _check_extra_norms(network, native, weights.source)
    theirs = swin_windows.from_buffers(weights.tensors, weights.source) or weights.windows
    changed, notes = swin_windows.compare(theirs, own, weights.source, setting)
    report.changed |= changed
    report.notes += notes


def _check_heads(network: nn.Module, native: Native, source: str) -> None:
    name = "layers.{}.blocks.0.attn.logit_scale"
    stages = [name.format(stage) for stage in range(len(network.layers)) if name.format(stage) in native.tensors]
    theirs = [len(native.tensors[key]) for key in stages]
    own = [len(network.get_parameter(key)) for key in stages]
    if theirs != own:
        raise ValueError(
            f"{source}: has {theirs} heads per stage (by attn.logit_scale), the model {own}: another size (model.name)"
        )


def _check_extra_norms(network: nn.Module, native: Native, source: str) -> None:
    theirs, own = _extra_norms(native.tensors), _extra_norms(network.state_dict())
    if theirs == own:
        return
    every = min((block + 1 for _, block in theirs), default=0)
    depths = [len(stage.blocks) for stage in network.layers]
    regular = {(s, b) for s, depth in enumerate(depths) for b in range(depth) if every and (b + 1) % every == 0}
    fix = f"set model.extra_norm_every={every}" if regular == theirs else "no model.extra_norm_every gives these"
    if not isinstance(network, SwinTransformerV2):
        fix = "timm's network cannot have them; use one of dsmim's (swinv2_…)"
    places = ", ".join(f"layers.{stage}.blocks.{block}" for stage, block in sorted(theirs)) or "no block"
    raise ValueError(f"{source}: has extra norms (enorm) in {places}, the model in {len(own)} blocks; {fix}")


def _extra_norms(names: Mapping[str, torch.Tensor]) -> set[tuple[int, int]]:
    found = (re.fullmatch(r"layers\.(\d+)\.blocks\.(\d+)\.enorm\.weight", name) for name in names)
    return {(int(match[1]), int(match[2])) for match in found if match}


def _drop_without_place(native: Native, shapes: Mapping[str, torch.Size]) -> None:
    for name in [name for name in native.tensors if name not in shapes]:
        if re.fullmatch(r"mask_token|decoder\.0\.(weight|bias)", name):
            native.drop(name, MIM_ONLY)
        elif name in ("norm.weight", "norm.bias") and _norms_after_pooling(native, shapes):
            native.drop(name, _POOLED)


def _norms_after_pooling(native: Native, shapes: Mapping[str, torch.Size]) -> bool:
    return "fc_norm.weight" in shapes and "norm.weight" not in shapes and "fc_norm.weight" not in native.tensors


def _may_be_fresh(native: Native, network: nn.Module, shapes: Mapping[str, torch.Size]) -> set[str]:
    """Return the tensors that may be missing in the file: of a group (such as a head) all are missing, or none."""
    groups = [heads.head_names(network, shapes), ["mask_token"], ["decoder.0.weight", "decoder.0.bias"]]
    if _POOLED in native.dropped.values():
        groups.append(["fc_norm.weight", "fc_norm.bias"])
    return {name for group in groups if not any(n in native.tensors for n in group) for name in group}


def _check_complete(native: Native, shapes: Mapping[str, torch.Size], may_be_fresh: set[str], source: str) -> None:
    problems = []
    for name, tensor in native.tensors.items():
        if name not in shapes:
            problems.append(f"{native.origin[name]}: no such tensor in the model")
        elif tensor.shape != shapes[name]:
            shape = f"shape {tuple(tensor.shape)}, the model has {tuple(shapes[name])}"
            problems.append(f"{native.origin[name]}: {shape}")
    problems += [f"{n}: missing in the file" for n in shapes if n not in native.tensors and n not in may_be_fresh]
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:10]) + ("\n  …" if len(problems) > 10 else "")
        raise ValueError(f"weights {source} do not fit the model ({len(problems)} tensors):{shown}")


def _full_precision(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
