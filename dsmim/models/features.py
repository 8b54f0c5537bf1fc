"""What a network knows of an image before any classifier: one vector."""

from __future__ import annotations

import torch
from torch import nn

from dsmim.models.registry import classifier
from dsmim.models.simmim import SimMIM


def feature_network(model: nn.Module) -> nn.Module:
    """Return a network images (B, C, H, W) → features (B, D) that shares the model's parameters.

    After SimMIM pre-training: the mean of the encoder's last map, of an image without mask (a class token has learned
    nothing there). Of a classifier: what its last layer takes.
    """
    return _MeanOfMap(model.encoder) if isinstance(model, SimMIM) else _BeforeClassifier(model)


class _MeanOfMap(nn.Module):
    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the mean over all positions, (B, D)."""
        return self.encoder.encode(self.encoder.tokens(images)).mean(dim=(2, 3))


class _BeforeClassifier(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.heads = [model.get_submodule(name) for name in classifier(model)]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the inputs of the classifier, (B, D); of several heads, one after the other."""
        seen: list[torch.Tensor] = []
        hooks = [head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for head in self.heads]
        try:
            self.model(images)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat([features.flatten(1) for features in seen], dim=1)
