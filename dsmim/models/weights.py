"""Foreign weights in, weights out. Every key is accounted for: used, dropped for a named reason, or an error."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass
class LoadReport:
    """What became of every key."""

    used: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    """key of the file → why it was not used"""
    fresh: list[str] = field(default_factory=list)
    """keys of the model that keep their initialisation"""

    def __str__(self) -> str:
        reasons = sorted(set(self.dropped.values()))
        counts = [f"{sum(r == reason for r in self.dropped.values())} dropped ({reason})" for reason in reasons]
        fresh = f"newly initialised: {', '.join(self.fresh)}" if self.fresh else "nothing newly initialised"
        return "; ".join([f"{len(self.used)} tensors used", *counts, fresh])


def encoder_of(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The encoder of a SimMIM state dict, prefix stripped, and the keys left out with the reason.

    A state dict without `encoder.` keys is an encoder already.
    """
    if not any(key.startswith("encoder.") for key in state):
        return dict(state), {}
    prefix = "encoder."
    kept = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return kept, {key: "only for masked image modelling" for key in state if not key.startswith(prefix)}


def load_into(model: nn.Module, state: dict[str, torch.Tensor], source: str) -> LoadReport:
    """Load a state dict of our own layouts into a classifier or a SimMIM model.

    Into a classifier, a SimMIM state gives its encoder; a head of another class count is left fresh.
    Raises ValueError when a key has no place, or a tensor other than the head finds no weights.
    """
    own = model.state_dict()
    if set(state) == set(own):
        dropped = {}
    else:
        state, dropped = encoder_of(state)
    report = LoadReport(dropped=dropped)
    heads = {key for key in state if key.startswith("head.") and key in own and state[key].shape != own[key].shape}
    report.dropped |= {key: f"head of {len(state[key])} classes, this run has {len(own[key])}" for key in heads}
    state = {key: value for key, value in state.items() if key not in heads}
    report.used = sorted(state)
    report.fresh = sorted(key for key in own if key not in state)
    problems = [f"{key}: no such tensor in the model" for key in state if key not in own]
    problems += [
        f"{key}: shape {tuple(state[key].shape)}, the model has {tuple(own[key].shape)}"
        for key in state
        if key in own and state[key].shape != own[key].shape
    ]
    problems += [f"{key}: missing in the file" for key in report.fresh if not key.startswith("head.")]
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:10])
        raise ValueError(f"weights {source} do not fit the model ({len(problems)} tensors):{shown}")
    model.load_state_dict(state, strict=False)  # strict by the checks above
    return report
