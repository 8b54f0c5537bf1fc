"""Networks of which a part does not learn."""

from __future__ import annotations

from torch import nn

from dsmim.models.registry import classifier


def freeze_all_but_classifier(model: nn.Module) -> None:
    """Let only the classifier's parameters take gradients. The forward pass then keeps no activations of the rest:
    nothing before the classifier needs a gradient. Raises ValueError for a network without classifier."""
    heads = [model.get_submodule(name) for name in classifier(model)]
    learning = {parameter for head in heads for parameter in head.parameters()}
    if not learning:
        raise ValueError("model.trainable: this network has no classifier that could learn; set model.trainable=all")
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in learning)


def frozen_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules that hold a frozen parameter, at any depth, or nothing that learns; of a model in which
    everything learns none.

    They run as in evaluation: without dropout and drop path, and BatchNorm with its saved statistics.
    """
    if all(parameter.requires_grad for parameter in model.parameters()):
        return []
    return [module for module in model.modules() if not _learns(module)]


def _learns(module: nn.Module) -> bool:
    learns = {parameter.requires_grad for parameter in module.parameters()}
    return learns == {True}
