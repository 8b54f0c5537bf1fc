"""mixup and CutMix."""

import pytest
import torch

from dsmim.recipe import ClassifyTask
from dsmim.tasks.mixing import mix


def test_mixing_pairs_neighbours_in_every_size_of_micro_batch():
    settings = ClassifyTask(name="classify", num_classes=4, mixup=0.8, cutmix=1.0)
    images, targets = torch.rand(8, 3, 8, 8), torch.eye(4).repeat(2, 1)
    for step in range(6):  # mixup in some steps, CutMix in others
        whole = mix(images, targets, settings, seed=0, step=step)
        halves = [mix(images[i : i + 4], targets[i : i + 4], settings, seed=0, step=step) for i in (0, 4)]
        for index in (0, 1):
            assert torch.equal(whole[index], torch.cat([half[index] for half in halves]))
        assert torch.allclose(whole[1].sum(1), torch.ones(8))
        share = whole[1][0, 0].item()  # sample 0 has class 0, its neighbour class 1
        assert whole[1][0, 1].item() == pytest.approx(1 - share, abs=1e-6)
