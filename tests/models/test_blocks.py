"""Recomputing blocks changes no gradient."""

import pytest
import torch

from dsmim.models import Recompute, create_model, set_recompute
from tests.models.networks import gradients, perturbed


@pytest.mark.parametrize("choice", [Recompute(1), Recompute(2), Recompute(1, stages=2)])
@pytest.mark.parametrize(("name", "options"), [("swinv2_nano", {"window_size": 4}), ("deit3_nano_patch16", {})])
def test_recomputing_changes_no_gradient(name, options, choice):
    """Drop path draws the same both times."""
    model = perturbed(create_model(name, img_size=64, num_classes=3, drop_path_rate=0.5, **options)).train()
    images, weight, results = torch.randn(4, 3, 64, 64), torch.randn(4, 3), []
    for recompute in (Recompute(), choice):
        set_recompute(model, recompute)
        torch.manual_seed(7)
        results.append(gradients(model, images, weight))
    assert torch.equal(results[0][0], results[1][0])
    for name, value in results[0][1].items():
        assert torch.equal(value, results[1][1][name]), name


def test_which_blocks_are_recomputed():
    assert [Recompute(2)(block) for block in range(4)] == [False, True, False, True]
    assert [Recompute(1, stages=1)(0, stage) for stage in (0, 1)] == [True, False]
    assert not Recompute()(0)
