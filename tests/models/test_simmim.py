"""SimMIM against a slow formula."""

import pytest
import torch

from dsmim.data.masking import RandomMask
from dsmim.models import SimMIM, create_model
from dsmim.models.simmim import sliding_norm


def slow_loss(model, images, mask):
    """The mean absolute error, pixel by pixel, as the paper states it."""
    prediction = model.reconstruct(images, mask)
    target = model.target(images)
    total, count = 0.0, 0
    for b in range(images.shape[0]):
        for y in range(images.shape[2]):
            for x in range(images.shape[3]):
                if mask[b, y // model.patch, x // model.patch]:
                    total += (target[b, :, y, x] - prediction[b, :, y, x]).abs().sum().item()
                    count += 1
    return total / count / images.shape[1]


@pytest.mark.parametrize("window", [None, 7])
def test_simmim_loss_against_a_slow_formula(window):
    torch.manual_seed(0)
    model = SimMIM(create_model("swinv2_nano", img_size=32, window_size=4), target_window=window).eval()
    images = torch.randn(2, 3, 32, 32)
    mask = torch.stack([RandomMask(32, 8, 4, 0.5)(), RandomMask(32, 8, 4, 0.3)()])  # unequal counts
    loss = model(images, mask)
    assert loss.item() == pytest.approx(slow_loss(model, images, mask), rel=1e-5)
    sums = model(images, mask, reduction="image_sum")
    assert sums.sum().item() / (mask.sum().item() * 16 * 3) == pytest.approx(loss.item(), rel=1e-5)
    assert torch.equal(model(images, mask.int()), loss)  # the authors' masks are integers


def test_hidden_tokens_are_replaced_by_the_mask_token():
    """Pixels under the mask must not change the prediction."""
    torch.manual_seed(0)
    model = SimMIM(create_model("swinv2_nano", img_size=32, window_size=4)).eval()
    images, mask = torch.randn(1, 3, 32, 32), RandomMask(32, 8, 4, 0.5)()[None]
    changed = images + 100 * model.hidden_pixels(mask)
    assert torch.equal(model.reconstruct(images, mask), model.reconstruct(changed, mask))
    with pytest.raises(ValueError, match="mask has shape"):
        model(images, mask[:, :4])


def test_sliding_norm_against_brute_force():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 12, 11) * 3 + 50
    half, result = 2, sliding_norm(images, 5)
    for y in range(12):
        for x in range(11):
            window = images[:, :, max(0, y - half) : y + half + 1, max(0, x - half) : x + half + 1].flatten(2)
            expected = (images[:, :, y, x] - window.mean(2)) / (window.var(2) + 1e-6).sqrt()
            assert torch.allclose(result[:, :, y, x], expected, atol=1e-4)
