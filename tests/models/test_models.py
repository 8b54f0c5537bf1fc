"""Sizes, SimMIM against a slow formula, and layer ids."""

import pytest
import torch

from dsmim.data.masking import RandomMask, mask_count
from dsmim.models import SimMIM, create_model, layer_ids, model_names
from dsmim.models.simmim import sliding_norm


@pytest.mark.parametrize(
    ("name", "encoder", "simmim"),
    [("swinv2_small", 48.96, 51.32), ("swinv2_base", 86.89, 90.04)],  # arXiv 2206.04664's sizes, in millions
)
def test_parameter_counts_of_the_papers(name, encoder, simmim):
    model = SimMIM(create_model(name, img_size=192, window_size=12))
    counts = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.encoder, model)]
    assert counts == pytest.approx([encoder, simmim], abs=0.006)


def test_finetuning_model_of_the_paper():
    model = create_model("swinv2_base", img_size=224, window_size=14, num_classes=1000)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(87.92, abs=0.006)
    assert [stage.blocks[0].attn.window for stage in model.layers] == [14, 14, 14, 7]


def test_unknown_model_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean swinv2_base"):
        create_model("swinv2_bass")
    with pytest.raises(ValueError, match="multiple of 32"):
        create_model("swinv2_nano", img_size=100)
    assert "swinv2_nano" in model_names()


def test_no_parameter_is_left_uninitialised_and_respostnorm_starts_at_zero():
    model = create_model("swinv2_nano", img_size=64, window_size=4, num_classes=3)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert all(p.abs().sum() == 0 for n, p in model.named_parameters() if ".norm1." in n or ".norm2." in n)
    assert model.layers[0].blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(("patches", "ratio", "count"), [(36, 0.6, 22), (49, 0.6, 30), (10, 0.3, 3), (9, 1.0, 9)])
def test_mask_counts_are_rounded_up(patches, ratio, count):
    assert mask_count(patches, ratio) == count


def test_mask_hides_whole_patches():
    mask = RandomMask(192, 32, 4, 0.6)()
    assert mask.shape == (48, 48) and mask.sum() == 22 * 64
    blocks = mask.view(6, 8, 6, 8).permute(0, 2, 1, 3).reshape(36, 64)
    assert set(blocks.sum(dim=1).tolist()) == {0, 64}
    with pytest.raises(ValueError, match=r"task\.mask_patch"):
        RandomMask(192, 30, 4, 0.6)


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
    """What lies under the mask must not reach the prediction."""
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


def test_layer_ids_of_the_base_model():
    ids = layer_ids(create_model("swinv2_base", img_size=192, window_size=12, num_classes=10))
    assert ids["patch_embed.proj.weight"] == 0 and ids["layers.0.blocks.0.attn.qkv.weight"] == 1
    # downsampling goes with the last block before it; timm names it after the next stage
    assert ids["layers.1.downsample.reduction.weight"] == 2 == ids["layers.0.blocks.1.norm1.weight"]
    assert ids["layers.3.downsample.norm.bias"] == 22 == ids["layers.2.blocks.17.mlp.fc1.weight"]
    assert ids["head.fc.weight"] == ids["norm.weight"] == 25
