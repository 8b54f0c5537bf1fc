"""The losses of a classification."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dsmim.engine.limits import untrained_loss
from dsmim.recipe.reading import parse_recipe
from dsmim.tasks import build_task
from dsmim.tasks.losses import LOSSES
from tests.conftest import tiny_recipe

CLASSIFY = {"name": "classify", "num_classes": 5}


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 5, generator=generator), torch.randint(5, (6,), generator=generator)


def test_cross_entropy_is_timm_s_over_soft_targets_and_torch_s_over_labels():
    from timm.loss import SoftTargetCrossEntropy

    logits, labels = batch()
    soft = F.one_hot(labels, 5) * 0.9 + 0.02
    assert torch.equal(LOSSES["cross_entropy"](logits, soft), SoftTargetCrossEntropy()(logits, soft))
    hard = LOSSES["cross_entropy"](logits, F.one_hot(labels, 5).float())
    assert hard.item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)


def test_bce_counts_every_class_in_the_mixture_as_whole():
    """As facebookresearch/deit: targets.gt(0.0), then BCEWithLogitsLoss; by timm's BinaryCrossEntropy too."""
    from timm.loss import BinaryCrossEntropy

    logits, labels = batch()
    mixed = 0.999 * F.one_hot(labels, 5) + 0.001 * F.one_hot(labels.flip(0), 5)
    there = torch.zeros(6, 5)
    for row, (one, other) in enumerate(zip(labels, labels.flip(0), strict=True)):
        there[row, [one, other]] = 1
    by_hand = -(there * torch.sigmoid(logits).log() + (1 - there) * torch.sigmoid(-logits).log()).sum() / (6 * 5)
    found = LOSSES["bce"](logits, mixed)
    assert found.item() == pytest.approx(by_hand.item(), rel=1e-6)
    assert torch.equal(found, nn.BCEWithLogitsLoss()(logits, mixed.gt(0.0).type(mixed.dtype)))
    assert torch.equal(found, BinaryCrossEntropy(smoothing=0.0, target_threshold=0.0)(logits, mixed))


@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_the_task_s_loss_validation_and_bound(tmp_path, loss):
    """The validation's loss is the cross entropy of the labels, as DeiT reports it, whatever is trained with."""
    task = build_task(parse_recipe(tiny_recipe(tmp_path, task=CLASSIFY | {"loss": loss}), "t"))
    logits, labels = batch()
    images = torch.zeros(6, 3, 32, 32, dtype=torch.uint8)
    values = {"image": images, "label": labels, "position": torch.arange(6), "weight": torch.ones(6)}
    targets = F.one_hot(labels, 5).float()
    assert torch.equal(task.training_loss(lambda images: logits, values), LOSSES[loss](logits, targets))
    figures = task.metrics(task.validation_sums(lambda images: logits, values))
    assert figures["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    untrained = task.training_loss(lambda images: torch.zeros(6, 5), values).item()
    assert untrained_loss(task.settings) == pytest.approx(untrained, rel=1e-6)
    assert untrained == pytest.approx(math.log(2 if loss == "bce" else 5), rel=1e-6)
