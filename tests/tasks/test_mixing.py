"""mixup and CutMix."""

import numpy as np
import pytest
import torch

from dsmim.data.order import Order, rank_positions
from dsmim.recipe import ClassifyTask
from dsmim.tasks.mixing import mix

SAMPLES, SIDE = 2000, 12


def settings(**changes) -> ClassifyTask:
    return ClassifyTask(**({"name": "classify", "num_classes": 4, "mixup": 0.8, "cutmix": 1.0} | changes))


def mixed(count: int, first: int = 0, seed: int = 0, **changes) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix images whose pixels all hold 1 at even places and 0 at odd ones; their classes are 0 and 1."""
    odd = torch.arange(count) % 2
    images = (1.0 - odd).view(-1, 1, 1, 1).expand(-1, 3, SIDE, SIDE + 4)
    targets = torch.eye(4)[odd]
    return mix(images, targets, torch.arange(first, first + count), settings(**changes), seed)


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4)])
@pytest.mark.parametrize("run", [2, 4, 6, 16])
def test_the_mixed_batch_is_the_same_in_every_split(ranks, accumulation, run):
    generator, chosen = torch.Generator().manual_seed(0), settings(mix_run=run)
    images, targets = torch.rand(16, 3, 9, 7, generator=generator), torch.rand(16, 4, generator=generator)
    for begin in (0, 16, 160):
        whole = mix(images, targets, torch.arange(begin, begin + 16), chosen, seed=3)
        parts = []
        for rank in range(ranks):
            positions = torch.tensor(rank_positions(begin, 16, ranks, rank))
            for part in positions.chunk(accumulation):
                parts.append(mix(images[part - begin], targets[part - begin], part, chosen, seed=3))
        for index in (0, 1):
            assert torch.equal(whole[index], torch.cat([part[index] for part in parts]))


@pytest.mark.parametrize("changes", [{}, {"mixup": 0.0}, {"cutmix": 0.0}, {"mix_run": 8}])
def test_labels_have_the_share_that_the_pixels_have(changes):
    images, targets = mixed(200, **changes)
    own = targets[:, 0]  # of the sample at the even place, as all its pixels are 1
    assert torch.allclose(images.mean(dim=(1, 2, 3)), own, atol=1e-6)
    assert torch.allclose(targets.sum(dim=1), torch.ones(200)) and torch.equal(own[0::2], targets[1::2, 1])


def test_each_run_has_its_own_draw():
    for run in (2, 8, 50):
        shares = mixed(SAMPLES, mix_run=run, cutmix=0.0)[1][0::2, 0].view(-1, run // 2)
        assert torch.equal(shares, shares[:, :1].expand_as(shares))
        assert len(shares[:, 0].unique()) > 0.99 * len(shares)
    other = [mixed(SAMPLES, **changes)[1] for changes in ({}, {"seed": 1}, {"first": SAMPLES})]
    assert not torch.equal(other[0], other[1]) and not torch.equal(other[0], other[2])


def test_coefficients_are_distributed_as_in_the_papers():
    """Beta(α, α) has variance 1 / (8 α + 4); CutMix's label follows the area inside the image."""
    shares = mixed(SAMPLES, cutmix=0.0)[1][0::2, 0].double().numpy()
    assert shares.mean() == pytest.approx(0.5, abs=0.03) and shares.var() == pytest.approx(1 / 10.4, rel=0.1)
    quantiles = np.quantile(shares, [0.1, 0.25, 0.75, 0.9])
    expected = np.quantile(np.random.default_rng(0).beta(0.8, 0.8, 100_000), [0.1, 0.25, 0.75, 0.9])
    assert quantiles == pytest.approx(expected, abs=0.05)
    from timm.data.mixup import cutmix_bbox_and_lam

    np.random.seed(0)
    theirs = [cutmix_bbox_and_lam((3, SIDE, SIDE + 4), np.random.beta(1, 1))[1] for _ in range(20_000)]
    ours = mixed(SAMPLES, mixup=0.0)[1][0::2, 0].double().numpy()
    assert ours.mean() == pytest.approx(np.mean(theirs), abs=0.03) and ours.std() == pytest.approx(
        np.std(theirs), abs=0.02
    )


@pytest.mark.parametrize("switch", [0.0, 0.25, 1.0])
def test_the_switch_chooses_per_draw(switch):
    images = mixed(SAMPLES, mix_switch=switch)[0][0::2]
    cut = (images == images.round()).all(dim=(1, 2, 3))  # CutMix keeps pixels as they are
    assert cut.double().mean().item() == pytest.approx(switch, abs=0.05)


@pytest.mark.parametrize("micro", [2, 4, 6, 12, 24])
def test_repeated_augmentation_never_mixes_an_image_with_its_copy(micro):
    """Two passes over windows of 6, 2, 4 and 1 samples, three times each. Where a pair belongs to both passes, the two
    may be one image by chance, as without repeats."""
    order, checked = Order([6, 2, 4, 1], seed=1, window=1, repeats=3, global_batch=24), 0
    for first in range(0, 72, micro):
        draws = [order[position] for position in range(first, first + micro)]
        own = torch.eye(13)[[draw.sample for draw in draws]]
        targets = mix(torch.zeros(micro, 1, 2, 2), own, torch.arange(first, first + micro), settings(cutmix=0), 0)[1]
        one_pass = torch.tensor([a.epoch == draws[place ^ 1].epoch for place, a in enumerate(draws)])
        assert ((targets > 0).sum(dim=1) == 2)[one_pass].all()
        checked += int(one_pass.sum())
    assert checked >= 72 - 2 * 3  # the passes meet once in each of the three turns
